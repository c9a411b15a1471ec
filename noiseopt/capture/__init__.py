"""Where gradients pass, their squared norms are read: fp32 squares, fp64 sums, no device waits."""

from noiseopt.capture.backward import BackwardCapture as BackwardCapture
from noiseopt.capture.local_norms import LocalNorms as LocalNorms
from noiseopt.capture.norms import device_of as device_of
from noiseopt.capture.norms import squared_norms as squared_norms
from noiseopt.capture.row import APPLIED as APPLIED
from noiseopt.capture.row import ENDED as ENDED
from noiseopt.capture.row import SECONDS as SECONDS
from noiseopt.capture.row import STEPS as STEPS
from noiseopt.capture.row import WEIGHT as WEIGHT
from noiseopt.capture.row import Measured as Measured
from noiseopt.capture.row import big_columns as big_columns
from noiseopt.capture.row import end_row as end_row
from noiseopt.capture.row import read_rows as read_rows
from noiseopt.capture.row import read_seconds as read_seconds
from noiseopt.capture.sharding import Share as Share
from noiseopt.capture.sharding import is_sharded as is_sharded
from noiseopt.capture.sharding import local as local
from noiseopt.capture.sharding import settled as settled
from noiseopt.capture.sharding import share_among as share_among
from noiseopt.capture.sharding import unsharded_leaves as unsharded_leaves
from noiseopt.capture.sums import scale_all as scale_all
from noiseopt.capture.sums import wide_type as wide_type
from noiseopt.capture.window import GradientWindow as GradientWindow
