"""Where gradients pass, their squared norms are read: fp32 squares, fp64 sums, no device waits."""

from noiseopt.capture.backward import BackwardCapture as BackwardCapture
from noiseopt.capture.norms import device_of as device_of
from noiseopt.capture.norms import squared_norms as squared_norms
from noiseopt.capture.row import APPLIED as APPLIED
from noiseopt.capture.row import TAIL as TAIL
from noiseopt.capture.row import Measured as Measured
from noiseopt.capture.row import read_rows as read_rows
from noiseopt.capture.window import GradientWindow as GradientWindow
from noiseopt.capture.window import scale_all as scale_all
