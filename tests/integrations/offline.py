"""Offline wandb runs, read back from the file that wandb wrote."""

import json
import struct
import time
from pathlib import Path

BLOCK = 32 * 1024


def records(folder: Path):
    """Yield the records of an offline run so far: a LevelDB log of protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    files = list(folder.rglob("*.wandb"))
    assert len(files) <= 1, files
    content = b"".join(path.read_bytes() for path in files)
    if len(content) < 7:
        return  # wandb's own process has not begun to write
    assert content[:4] == b":W&B"
    position, whole = 7, b""
    while position + 7 <= len(content):
        if BLOCK - position % BLOCK < 7:  # a block's rest is padding
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        if position + 7 + length > len(content):
            return  # it is being written
        whole += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def finished(folder: Path):
    """Return a run's records; `finish()` may return before wandb's own process has written all."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        found = list(records(folder))
        if found and found[-1].WhichOneof("record_type") == "exit":
            return found
        time.sleep(0.01)
    raise TimeoutError(f"the run in {folder} was not finished")


def items(entries):
    return {
        ".".join(entry.nested_key) or entry.key: json.loads(entry.value_json) for entry in entries
    }


class Written:
    """What a finished offline run holds."""

    def __init__(self, folder: Path):
        self.rows, self.metrics, self.summary, self.config = [], {}, {}, {}
        self.alerts = []
        for record in finished(folder):
            kind = record.WhichOneof("record_type")
            if kind == "history":
                self.rows.append(items(record.history.item))
            elif kind == "alert":
                self.alerts.append(record.alert)
            elif kind == "metric":
                self.metrics[record.metric.name or record.metric.glob_name] = record.metric
            elif kind == "summary":
                self.summary |= items(record.summary.update)
            elif kind == "config":
                self.config |= items(record.config.update)

    def own_rows(self):
        """Return the rows as the user logged them."""
        ours = ("noise/", "decide/", "clip/", "group/", "_runtime", "_timestamp")
        return [
            {name: value for name, value in row.items() if not name.startswith(ours)}
            for row in self.rows
        ]
