"""Exact gradient flow of deep linear networks, far enough to see its limits.

>>> import gflow
>>> data = gflow.datasets.separable(n=20, d=2, margin=0.1, seed=0)
>>> problem = gflow.Problem(data, loss=gflow.Exponential())
>>> weights = gflow.init.balanced((2, 3, 1), end_to_end=data.max_margin().direction)
>>> flow = gflow.gradient_flow(problem, weights, until=gflow.LogRisk(-100), save=5)
>>> flow.attrs["status"]
'reached'
"""

from gflow.analysis import exact as exact
from gflow.analysis.compare import compare as compare
from gflow.analysis.gap_bound import gap_bound as gap_bound
from gflow.analysis.kinks import kinks as kinks
from gflow.analysis.ladder import ladder as ladder
from gflow.analysis.saddles import Plateau as Plateau, Plateaus as Plateaus, saddles as saddles
from gflow.analysis.theorems import Claim as Claim, Claims as Claims, verify as verify
from gflow.dynamics import clocks as clocks
from gflow.dynamics.descending.paper_steps import (
    ball_smoothness as ball_smoothness,
    paper_steps as paper_steps,
)
from gflow.dynamics.descending.step_sizes import (
    loss_line_search as loss_line_search,
    loss_scaled as loss_scaled,
    on_log_risk as on_log_risk,
    polyak as polyak,
)
from gflow.dynamics.descent import gradient_descent as gradient_descent
from gflow.dynamics.ensemble import ensemble as ensemble
from gflow.dynamics.field import FlowField as FlowField, FlowState as FlowState
from gflow.dynamics.flow import gradient_flow as gradient_flow
from gflow.dynamics.modified import ModifiedEquation as ModifiedEquation
from gflow.dynamics.radau.gauss_newton import GaussNewton as GaussNewton
from gflow.dynamics.split.slow_manifold import SlowManifold as SlowManifold
from gflow.dynamics.stops import (
    KKT as KKT,
    Epochs as Epochs,
    LogRisk as LogRisk,
    LogTime as LogTime,
    MarginGap as MarginGap,
    Misalignment as Misalignment,
    Saddle as Saddle,
    Steps as Steps,
    Time as Time,
)
from gflow.problem import datasets as datasets, init as init, observables as observables
from gflow.problem.data import Dataset as Dataset
from gflow.problem.deep_linear import DeepLinear as DeepLinear
from gflow.problem.frameworks import from_equinox as from_equinox, from_flax as from_flax
from gflow.problem.kinks import leaky_relu as leaky_relu, relu as relu
from gflow.problem.losses import (
    AbstractLoss as AbstractLoss,
    Exponential as Exponential,
    Logistic as Logistic,
)
from gflow.problem.max_margin import MaxMargin as MaxMargin, max_margin as max_margin
from gflow.problem.mlp import MLP as MLP
from gflow.problem.network import Network as Network
from gflow.problem.polynomial_tail import PolynomialTail as PolynomialTail
from gflow.problem.regression import Regression as Regression
from gflow.problem.risk import Problem as Problem
from gflow.problem.sensing import Sensing as Sensing
from gflow.problem.soft_margin import (
    CrossEntropy as CrossEntropy,
    PairwiseExponential as PairwiseExponential,
)
from gflow.problem.squared import Squared as Squared
from gflow.programs import cache_programs as cache_programs
from gflow.record import save as save
from gflow.report import plot as plot
from gflow.report.check import Check as Check, Checks as Checks, check as check
from gflow.report.groups import load as load
from gflow.report.sweep import sweep as sweep
