def resolve(name, cache):
    return name
