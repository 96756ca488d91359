"""The bounds of a comparison, with the reason for each."""

from __future__ import annotations

# One step from the same weights, float64. A sum of m products of float64 carries about sqrt(m) eps of rounding;
# BLeNet's largest sums (a batch of convolution outputs) have 1e5 terms: 300 * 2.2e-16 = 7e-14, times the network's
# depth of 13 layers.
FLOAT64 = 1e-12
# The same in float32: a few eps a layer, 17 eps for the logits and the statistics. The gradient goes through twice the
# depth; its error is that of the whole gradient as one vector (`relative_norm_error`), since single tensors may be
# small by cancellation: a beta's gradient is a sum over a whole batch of images.
FLOAT32_LOGITS = 2e-6
FLOAT32_GRADIENTS = 5e-6
# Steps from the same weights on the same batches: rounding differences of each step are carried along; training on a
# cross-entropy neither damps nor blows them up much, so that they grow with the number of steps. Absolute, for
# parameters and logits of size 1.
FLOAT64_LOSSES_200_STEPS = 1e-11
FLOAT64_PARAMETERS_200_STEPS = 1e-10
# Adam makes steps out of a gauge's rounding noise. The moving mean follows the bias some ten batches behind, and this
# lag reaches the logits of a prediction multiplied by gamma / sqrt(var) of the layers: ten times the parameters' bound.
FLOAT64_LOGITS_200_STEPS = 1e-9
FLOAT32_PARAMETERS_200_SGD_STEPS = 2e-6
FLOAT32_LOGITS_200_SGD_STEPS = 1e-5
# Neither wing is farther from the float64 referee than this many times the other: then neither rounds carelessly.
FARTHEST_FROM_REFEREE = 4

# What `parity.check` and `parity compare` allow in float64, of any pair: what it leaves of a network that is the same
# on both sides is 1e-15 to 1e-12, as above; the smallest known mistake, another epsilon under a variance of 1, is over
# 1e-7.
FORWARD_BOUND, BACKWARD_BOUND = 1e-10, 1e-9
# A side may compute in float32 inside a float64 run, and then its rounding is measured. A layer's is not above the
# first of these (100 ulp), a network's, carried along, not above the second: a product in TensorFloat-32 rounds by 1e-4
# at once.
MOST_NOISE, MOST_CARRIED = 1e-5, 1e-4
# A gradient that cancels, as of the keys of an attention whose values hardly differ, makes a thousand times more of
# that rounding, which is measured there as well. It is believed up to this, where all agrees forward and modules aside
# of the kinks (`evidence/aside.py`) still differ there: what is wrong backward only, as a gradient that is stopped, is
# of size 1.
MOST_CANCELLED = 1e-2
