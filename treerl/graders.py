FAULTS = ("", "raised", "hung", "not_finite")
