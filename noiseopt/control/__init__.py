"""Estimate in, decision out: the controller of batch, rates and clipping. Pure Python, no torch."""

from noiseopt.control.config import NoiseConfig as NoiseConfig
from noiseopt.control.controller import Controller as Controller
from noiseopt.control.decision import Decision as Decision
from noiseopt.control.decision import Window as Window
from noiseopt.control.metrics import metrics as metrics
from noiseopt.control.progress import Progress as Progress
from noiseopt.control.proposal import paying_batch as paying_batch
from noiseopt.control.proposal import unknown as unknown
from noiseopt.control.rates import RATE_RULES as RATE_RULES
from noiseopt.control.rates import RateRule as RateRule
from noiseopt.control.rates import Rates as Rates
from noiseopt.control.rates import adascale_gain as adascale_gain
from noiseopt.control.rates import bias_correction as bias_correction
from noiseopt.control.rates import scaled_beta as scaled_beta
from noiseopt.control.rates import sqrt_gain as sqrt_gain
from noiseopt.control.saved import from_saved as from_saved
from noiseopt.control.saved import to_saved as to_saved
from noiseopt.control.start import Start as Start
from noiseopt.control.start import group_names as group_names
from noiseopt.control.state import ControllerState as ControllerState
from noiseopt.control.state import from_numbers as from_numbers
from noiseopt.control.state import to_numbers as to_numbers
from noiseopt.control.verification import Judgement as Judgement
