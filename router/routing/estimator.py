"""The gate as an estimator of scikit-learn, with its parameters, clones and checks."""

from __future__ import annotations

from sklearn.base import BaseEstimator

from router.routing.gate import Gate


class PrototypeGate(Gate, BaseEstimator):  # type: ignore[misc]
    """`router.routing.gate.Gate` for pipelines and searches of scikit-learn."""
