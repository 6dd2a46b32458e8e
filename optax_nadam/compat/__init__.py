"""Other frameworks' Nadams: their constructors, configs and checkpoints, translated by one module each."""

from optax_nadam.compat import keras as keras
from optax_nadam.compat import optax as optax
from optax_nadam.compat import timm as timm
from optax_nadam.compat import torch as torch
