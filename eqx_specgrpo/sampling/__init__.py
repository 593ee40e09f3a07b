from ._noise import exponential_noise as exponential_noise, threefry_2x32 as threefry_2x32
from ._sampling import (
    AbstractSampling as AbstractSampling,
    Categorical as Categorical,
    GreedySampling as GreedySampling,
    Sampling as Sampling,
    first_argmax as first_argmax,
    make_sampling as make_sampling,
    sample_weights as sample_weights,
)
from ._temperature import as_temperature as as_temperature, temper as temper
from ._truncated import TruncatedSampling as TruncatedSampling, restricted as restricted
