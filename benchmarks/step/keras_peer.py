"""Keras, compiled, with train_on_batch and predict_on_batch, whichever backend KERAS_BACKEND names.

They are what fit and predict call for every batch. In JAX Keras jits the step and donates the state by itself; in
PyTorch it runs eagerly.
"""

from __future__ import annotations

import keras
import numpy as np
from keras import layers

from benchmarks.step.network import (
    EPSILON,
    LEARNING_RATE,
    MOMENTUM,
    NUM_CLASS,
    Data,
    Network,
    Norm,
    Weights,
    channels_last,
)


def _normalization() -> keras.layers.Layer:
    return layers.BatchNormalization(momentum=MOMENTUM, epsilon=EPSILON)


def _model(fig_size: int) -> keras.Model:
    model = keras.Sequential(
        [
            keras.Input((fig_size, fig_size, 1)),
            layers.Conv2D(6, 5, padding="same"),
            _normalization(),
            layers.Activation("sigmoid"),
            layers.AveragePooling2D(2),
            layers.Conv2D(16, 5),
            _normalization(),
            layers.Activation("sigmoid"),
            layers.AveragePooling2D(2),
            layers.Flatten(),
            layers.Dense(120),
            _normalization(),
            layers.Activation("sigmoid"),
            layers.Dense(84),
            _normalization(),
            layers.Activation("sigmoid"),
            layers.Dense(NUM_CLASS),
        ]
    )
    model.compile(
        optimizer=keras.optimizers.Adam(LEARNING_RATE, epsilon=1e-8),  # the others' default; Keras's is 1e-7
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model


def _place(data: Data) -> list:
    return [
        (keras.ops.convert_to_tensor(x[..., None]), keras.ops.convert_to_tensor(labels)) for x, labels in data.batches()
    ]


def make(weights: Weights, fig_size: int) -> Network:
    """The peer."""
    model = _model(fig_size)
    with_weights = [layer for layer in model.layers if layer.weights]
    for layer, given in zip(with_weights, channels_last(weights), strict=True):
        # In both the order of the fields is Keras's.
        assert isinstance(layer, layers.BatchNormalization) == isinstance(given, Norm)
        layer.set_weights(list(given))
    return Network(
        _place,
        lambda batch: model.train_on_batch(*batch),
        lambda loss: [float(np.asarray(loss))],
        lambda batch: model.predict_on_batch(batch[0]),
        lambda _: None,  # both return numpy
    )
