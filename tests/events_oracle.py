"""TensorBoard's reading of a folder of event files, in plain Python."""
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
