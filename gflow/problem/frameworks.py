r"""Networks from equinox and flax: a model in, a network and its weights out, and back again.

Nothing here knows layers by their names. The chain of dense matrices is read off the operations
that the model consists of: a matrix among the weights that is contracted with something that
depends on the input is a dense layer, the contracted axis says which way round it is kept, and the
order of the contractions is that of the layers.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from gflow.problem.abstract_data import AbstractData
from gflow.problem.arguments import shown
from gflow.problem.array import Array
from gflow.problem.dense import leaves_of
from gflow.problem.design import AbstractDesign
from gflow.problem.network import AbstractNetwork, Network
from gflow.problem.weights import Weights, float_leaves

if TYPE_CHECKING:
    import xarray as xr

    from gflow.problem.bends import AbstractBends

Layers = Callable[[Any], Sequence[Any]]

STATEFUL = (
    "Its value at a point depends on more than the weights and that point, so that the risk has no "
    "gradient flow. "
)


def from_equinox(
    model: eqx.Module, layers: Layers | None = None
) -> tuple["FrameworkNetwork", Weights]:
    """A network and its start from an equinox model of a single point, ``model(x)``.

    Every array of real numbers in the model is a weight, biases and filters included.

    Args:
        model: any equinox module. Points have the shape that it takes, as (channels, rows, columns)
            for convolutions: ``Dataset(images, labels)``.
        layers: ``layers(model)``, the dense matrices to be observed from input to output, as
            ``lambda model: [model.hidden.weight, model.out.weight]``. By default they are found:
            the last matrices of the model that are multiplied with what comes from the point, as
            many as fit each other.

    Returns:
        The network, for ``gflow.Problem(data, network)``, and the weights, for the verbs.
        ``network.model(weights)`` is a model again.

    Raises:
        ValueError: when the model has parts with a state (batch normalisation, spectral
            normalisation) or noise (dropout that is on), or no weights.
    """
    if not isinstance(model, eqx.Module):
        raise ValueError(f"`model` is {shown(model)}; expected an equinox module.")
    for part in jax.tree.leaves(model, is_leaf=_has_state_or_noise):
        if isinstance(part, eqx.nn.StateIndex):
            raise ValueError(
                "`model` has a part with a state, as batch normalisation; expected one without. "
                f"{STATEFUL}Use layer or group normalisation, or none."
            )
        if _is_noise(part):
            raise ValueError(
                f"`model` has dropout that is on, {part}; expected a model without noise. "
                f"{STATEFUL}Switch it off: equinox.nn.inference_mode(model)."
            )
    arrays, rest = eqx.partition(model, eqx.is_inexact_array)
    return FrameworkNetwork.of(EquinoxModel(rest), "model", arrays, layers)


def from_flax(
    module: Any, params: Mapping[str, Any], layers: Layers | None = None
) -> tuple["FrameworkNetwork", Weights]:
    """A network and its start from a module of ``flax.linen`` and its parameters.

    The module is applied to a batch of one point, ``module.apply({"params": params}, x[None])``.

    Args:
        module: of ``flax.linen``.
        params: its parameters: ``module.init(key, x)["params"]``, or all that ``init`` returns.
        layers: ``layers(params)``, the kernels of the dense layers to be observed from input to
            output, as flax keeps them, (inputs, outputs), for example
            ``lambda params: [params["Dense_0"]["kernel"], params["Dense_1"]["kernel"]]``. By
            default they are found, as by `from_equinox`.

    Returns:
        The network and the weights. ``network.model(weights)`` are parameters again, of the form
        that ``params`` has.

    Raises:
        ValueError: when there are variables beside parameters, as those of batch normalisation, or
            no parameters.
        ImportError: when flax is not installed.
    """
    import flax.linen  # pyright: ignore[reportMissingImports]

    if not isinstance(module, flax.linen.Module):
        raise ValueError(f"`module` is {shown(module)}; expected a module of flax.linen.")
    if not isinstance(params, Mapping):
        raise ValueError(
            f"`params` is {shown(params)}; expected the parameters, module.init(key, x)['params']."
        )
    whole = "params" in params
    others = sorted(set(params) - {"params"}) if whole else []
    if others:
        raise ValueError(
            f"`params` has the collection {others[0]!r} beside the parameters, as batch "
            f"normalisation has; expected parameters only. {STATEFUL}Use layer or group "
            "normalisation, or none."
        )
    given = params["params"] if whole else params
    model = FlaxModel(module, whole)
    if layers is not None:
        layers = Kernels(layers)
    return FrameworkNetwork.of(model, "params", given, layers)


class AbstractModel(eqx.Module):
    """A model without its weights; equal to another if both compute the same."""

    @abstractmethod
    def __call__(self, weights: Weights, x: Array) -> Array:
        """The outputs at one point; pure JAX."""

    @abstractmethod
    def whole(self, weights: Weights) -> Any:
        """The framework's own object with these weights."""


class EquinoxModel(AbstractModel):
    """What is left of an equinox module without its weights."""

    rest: Any

    def __call__(self, weights: Weights, x: Array) -> Array:
        return eqx.combine(weights, self.rest)(x)

    def whole(self, weights: Weights) -> Any:
        return eqx.combine(weights, self.rest)

    # Arrays among what is no weight, as of whole numbers, are compared by their bytes.
    @property
    def _key(self) -> tuple:
        leaves, structure = jax.tree.flatten(self.rest)
        return structure, tuple(
            (leaf.shape, str(leaf.dtype), np.asarray(leaf).tobytes())
            if eqx.is_array(leaf)
            else leaf
            for leaf in leaves
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EquinoxModel) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


class FlaxModel(AbstractModel):
    """A module of flax."""

    module: Any = eqx.field(static=True)
    nested: bool = eqx.field(static=True)
    """Whether parameters were given, and are given back, as {"params": ...}."""

    def __call__(self, weights: Weights, x: Array) -> Array:
        import flax.errors  # pyright: ignore[reportMissingImports]

        try:
            return self.module.apply({"params": weights}, x[None])[0]
        except (flax.errors.ScopeCollectionNotFound, flax.errors.InvalidRngError) as error:
            raise ValueError(
                f"the module has a part with a state or noise ({error}). {STATEFUL}"
            ) from error

    def whole(self, weights: Weights) -> Any:
        return {"params": weights} if self.nested else weights


class Kernels(eqx.Module):
    """A choice of flax's kernels, the other way round."""

    chosen: Layers = eqx.field(static=True)

    def __call__(self, weights: Weights) -> list[Any]:
        return [kernel.T for kernel in self.chosen(weights)]


class Scalar(eqx.Module):
    """A model with one output, as a scalar."""

    model: AbstractModel

    def __call__(self, weights: Weights, x: Array) -> Array:
        return jnp.reshape(self.model(weights, x), ())


class Use(NamedTuple):
    """A matrix among the weights that is multiplied with what comes from the point."""

    leaf: int
    transposed: bool
    """Whether it is kept the other way round."""
    shape: tuple[int, int]
    """(outputs, inputs)."""


class Chosen(NamedTuple):
    """The function of the weights that gives the matrices of some uses."""

    uses: tuple[Use, ...]

    def __call__(self, weights: Weights) -> list[Any]:
        leaves = jax.tree.leaves(weights)
        return [leaves[u.leaf].T if u.transposed else leaves[u.leaf] for u in self.uses]


class ModelNetwork(Network):
    """A network whose function is a model of another library."""

    called = "the model"


class FrameworkNetwork(AbstractNetwork):
    """A network that another library defines: what `from_equinox` and `from_flax` return."""

    forward: AbstractModel = eqx.field(static=True)
    structure: Any = eqx.field(static=True)
    shapes: tuple[jax.ShapeDtypeStruct, ...] = eqx.field(static=True)
    """Shapes and types of the model's own weights."""
    chain: Layers | None = eqx.field(static=True)
    network: Network

    @classmethod
    def of(
        cls, forward: AbstractModel, argument: str, given: Any, layers: Layers | None
    ) -> tuple["FrameworkNetwork", Weights]:
        """The network and the weights in ``given``, the argument of this name."""
        weights = float_leaves(argument, given)
        leaves, structure = jax.tree.flatten(given)
        if not leaves:
            raise ValueError(f"`{argument}` has no weights: no array of real numbers.")
        shapes = tuple(jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype) for leaf in leaves)
        return cls(
            forward, structure, shapes, layers, ModelNetwork(forward, None, layers, None)
        ), weights

    def weights_of(self, record: "xr.Dataset", which: str = "final") -> Weights:
        """The "initial" or "final" weights of a record, as the model has them."""
        leaves = leaves_of(record, which, len(self.shapes))
        return jax.tree.unflatten(self.structure, leaves)

    def model(self, weights: "Weights | xr.Dataset") -> Any:
        """The framework's model with these weights, in the types that it had.

        Args:
            weights: of the network, or a record: the weights at its last point.

        Raises:
            ValueError: when there are more or fewer arrays, or others in shape.
        """
        if hasattr(weights, "data_vars"):
            weights = self.weights_of(weights)
        leaves = jax.tree.leaves(weights)
        if [np.shape(leaf) for leaf in leaves] != [leaf.shape for leaf in self.shapes]:
            raise ValueError(
                f"`weights` has arrays of shape {[np.shape(leaf) for leaf in leaves]}; expected "
                f"those of the model, {[leaf.shape for leaf in self.shapes]}."
            )
        kept = [
            jnp.asarray(np.asarray(leaf), like.dtype)
            for leaf, like in zip(leaves, self.shapes, strict=True)
        ]
        return self.forward.whole(jax.tree.unflatten(self.structure, kept))

    def on(self, data: AbstractData, /) -> "FrameworkNetwork":
        """The network with its dense layers found, and one output as a scalar."""
        weights = jax.tree.unflatten(self.structure, self.shapes)
        point = jax.ShapeDtypeStruct(data.points.shape[1:], data.inputs.dtype)
        apply, chain = self.forward, self.chain
        try:
            traced, out = jax.make_jaxpr(self.forward, return_shape=True)(weights, point)
        except Exception:  # whatever it is, it is the model's; `check` says so
            return self
        if getattr(out, "shape", None) == (1,) and data.output_shape == ():
            apply = Scalar(self.forward)
        if chain is None:
            found = last_fitting(uses_of(traced.jaxpr, len(self.shapes)))
            chain = Chosen(found) if found else None
        network = ModelNetwork(apply, None, chain, None)
        return FrameworkNetwork(self.forward, self.structure, self.shapes, self.chain, network)

    def dense_layers(self, weights: Weights) -> tuple[Array, ...] | None:
        return self.network.dense_layers(weights)

    def kinks(self, weights: Weights, data: AbstractData) -> "AbstractBends | None":
        return self.network.kinks(weights, data)

    def hidden_kinks(self, weights: Weights, data: AbstractData) -> bool:
        return self.network.hidden_kinks(weights, data)

    def switches(self, weights: Weights, data: AbstractData) -> Array:
        return self.network.switches(weights, data)

    def design(self, data: AbstractData) -> AbstractDesign | None:
        return self.network.design(data)

    def coordinates(self, weights: Weights, data: AbstractData) -> Array:
        return self.network.coordinates(weights, data)

    def pullback(
        self, weights: Weights, data: AbstractData
    ) -> tuple[Array, Callable[[Array], tuple[Weights, Array]]]:
        return self.network.pullback(weights, data)

    def check(self, weights: Weights, data: AbstractData) -> Weights:
        if jax.tree.structure(weights) != self.structure:
            raise ValueError(
                "`weights` has another structure than those of the model; expected the weights "
                "that came with the network."
            )
        return self.network.check(weights, data)


def _is_noise(part: Any) -> bool:
    return isinstance(part, eqx.nn.Dropout) and not part.inference and part.p != 0


def _has_state_or_noise(part: Any) -> bool:
    return isinstance(part, eqx.nn.StateIndex | eqx.nn.Dropout)


# -------------------------------------------------------------------------------------------------
# Reading a chain off a program
# -------------------------------------------------------------------------------------------------


class _Seen(NamedTuple):
    """What is known of an array inside a program."""

    leaf: int | None = None
    """The weight that it is, if it is one."""
    transposed: bool = False
    of_point: bool = False
    """Whether it depends on the point."""


NOTHING = _Seen()


def uses_of(program: Any, num_weights: int) -> list[Use]:
    """The matrices among the weights that are multiplied with what depends on the point, in order.

    Args:
        program: a jaxpr whose first inputs are the weights, and whose others are the point.
        num_weights: how many.
    """
    inputs = [_Seen(leaf=k) for k in range(num_weights)]
    inputs += [_Seen(of_point=True)] * (len(program.invars) - num_weights)
    found: list[Use] = []
    _read(program, inputs, found)
    return found


def _read(program: Any, inputs: Sequence[_Seen], found: list[Use]) -> list[_Seen]:
    """Go through a program's operations; returns what its outputs are."""
    known: dict[Any, _Seen] = dict(zip(program.invars, inputs, strict=True))

    def of(atom: Any) -> _Seen:
        return NOTHING if hasattr(atom, "val") else known.get(atom, NOTHING)  # a literal is no key

    for step in program.eqns:
        given = [of(atom) for atom in step.invars]
        inner = _inside(step)
        if inner is not None and len(inner.invars) == len(given):
            known.update(zip(step.outvars, _read(inner, given, found), strict=True))
            continue
        result = _Seen(of_point=any(each.of_point for each in given))
        if step.primitive is jax.lax.dot_general_p:
            found += _uses_in(step, given)
        elif given and given[0].leaf is not None:
            result = _moved(step, given[0], result)
        known.update(dict.fromkeys(step.outvars, result))
    return [of(atom) for atom in program.outvars]


def _inside(step: Any) -> Any:
    """The program that an operation calls once with its own arguments, if it is such a call."""
    if step.primitive.name in ("while", "scan", "cond"):
        return None
    for value in step.params.values():
        inner = getattr(value, "jaxpr", value)
        if hasattr(inner, "eqns"):
            return inner
    return None


def _moved(step: Any, before: _Seen, otherwise: _Seen) -> _Seen:
    """A weight after an operation that leaves its entries as they are."""
    if step.primitive is jax.lax.transpose_p and len(step.params["permutation"]) == 2:
        turned = tuple(step.params["permutation"]) == (1, 0)
        return before._replace(transposed=before.transposed ^ turned)
    return before if step.primitive is jax.lax.convert_element_type_p else otherwise


def _uses_in(step: Any, given: Sequence[_Seen]) -> list[Use]:
    """The use of a weight in a product, if there is one."""
    contracted, batch = step.params["dimension_numbers"]
    for side in (0, 1):
        weight, other = given[side], given[1 - side]
        shape = step.invars[side].aval.shape
        plain = len(shape) == 2 and len(contracted[side]) == 1 and not batch[side]
        if weight.leaf is None or not other.of_point or not plain:
            continue
        axis = contracted[side][0]
        rows, columns = shape[1 - axis], shape[axis]
        return [Use(weight.leaf, weight.transposed ^ (axis == 0), (rows, columns))]
    return []


def last_fitting(uses: Sequence[Use]) -> tuple[Use, ...]:
    """The longest chain of matrices at the end, each of which takes what the one before gives.

    What is used more than once, as in a recurrent network, is no layer.
    """
    leaves = [use.leaf for use in uses]
    once = [use for use in uses if leaves.count(use.leaf) == 1]
    chain = once[-1:]
    for use in reversed(once[:-1]):
        if use.shape[0] != chain[0].shape[1]:
            break
        chain.insert(0, use)
    return tuple(chain)
