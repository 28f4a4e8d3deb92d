"""TensorBoard's reading of a folder of event files, and W&B's files, in plain Python."""

import json
import struct

from tensorboardX.proto.event_pb2 import Event, SessionLog


def crc32c(data: bytes) -> int:
    """The Castagnoli checksum, bit by bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def records(data: bytes) -> list[Event]:
    """The whole records of one file; asserts their checksums. A record cut short ends the file."""

    def whole(part: bytes, checksum: bytes) -> bool:
        crc = crc32c(part)
        return struct.unpack("<I", checksum) == (((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32,)

    found, at = [], 0
    while at + 12 <= len(data):
        assert whole(data[at : at + 8], data[at + 8 : at + 12])
        (length,) = struct.unpack("<Q", data[at : at + 8])
        event, checksum = data[at + 12 : at + 12 + length], data[at + 12 + length : at + 16 + length]
        if len(checksum) < 4:
            break
        assert whole(event, checksum)
        found.append(Event.FromString(event))
        at += 16 + length
    return found


def scalars(folder) -> dict[int, dict[str, float]]:
    """step -> tag -> value, what a file's session start replaces left out."""
    result = {}
    for path in sorted(folder.glob("*tfevents*")):
        events = records(path.read_bytes())
        assert events[0].file_version == "brain.Event:2"
        for event in events:
            if event.session_log.status == SessionLog.START:
                result = {step: values for step, values in result.items() if step < event.step}
            for value in event.summary.value:
                line = result.setdefault(event.step, {})
                assert value.tag not in line
                line[value.tag] = value.simple_value
    return result


def wandb_lines(file) -> list[tuple[int, dict]]:
    """(step, name -> number) of each line in a .wandb file: blocks of 32 KiB as LevelDB's log has them, of protobuf records."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts, found = file.read_bytes(), 7, b"", []  # behind the magic number
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # no room for a head
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or last part
            record, parts = Record.FromString(parts), b""
            if record.HasField("history"):
                line = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                found.append((line.pop("_step"), {name: x for name, x in line.items() if not name.startswith("_")}))
    return found
