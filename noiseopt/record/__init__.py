"""The record of a run: every decision with its evidence, one JSON object to a line.

A file is a sequence of *starts* and *decisions*. A start says what decides from there on: the
settings, the learning-rate rule, the parameter groups and the controller's state. A decision holds
what was measured since the decision or start before, what was decided and why. So every stretch can
be decided again, and compared, from the file alone, also one that begins at a checkpoint.

Every line has

- `schema`: the version of this format, 2;
- `kind`: "start" or "decision";
- `time`: when it was written, in seconds since 1970;
- `config_hash`: of the settings that decided; a start line tells them all.

A start has `version` (of noiseopt) and the fields of `noiseopt.control.Start`, a decision those of
`noiseopt.control.Decision`, where they are described. `windows` holds a list for each window, the
fields of `noiseopt.control.Window` in their order. The lines are strict JSON: floats that are not
finite are the strings "inf", "-inf" and "nan". Fields that came later are left out where they say
nothing (`noiseopt.record.lines.LATER`): of the settings `objective`, if it is "updates", and
`measure_interval`, if it is 1; of a decision `seconds` and `costs`, if they are None; of the state
`timing`, unless the objective is "time".

Files are bounded: a full `decisions.jsonl` becomes `decisions.part1.jsonl`, that becomes
`decisions.part2.jsonl`, and so on; the oldest goes. Each begins with a start. What a resumed run
decides anew is moved to `decisions.superseded.jsonl`, which is not bounded and no part of it.
"""

from noiseopt.record.lines import SCHEMA as SCHEMA
from noiseopt.record.lines import from_line as from_line
from noiseopt.record.lines import to_line as to_line
from noiseopt.record.log import DecisionLog as DecisionLog
from noiseopt.record.reading import Record as Record
from noiseopt.record.reading import Stretch as Stretch
from noiseopt.record.reading import read as read
from noiseopt.record.replay import Replayed as Replayed
from noiseopt.record.replay import replay as replay
