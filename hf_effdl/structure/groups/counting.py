"""Counting multiply-accumulates: how often one forward pass uses the entries of every weight."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hf_effdl.structure.groups.group import CONVS, Network
from hf_effdl.structure.groups.inputs import call, copy_of, describe, logger, one_row


TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (*CONVS, *TRANSPOSED, nn.Linear)
LAYER_FUNCTIONS = ("linear", *(f"conv{t}{n}d" for t in ("", "_transpose") for n in (1, 2, 3)))
MATRIX_FUNCTIONS = ("matmul", "mm", "bmm")
# with one more operand in front, which is added
ADDED_FUNCTIONS = ("addmm", "baddbmm")
LOOKUPS = (nn.Embedding, nn.EmbeddingBag)  # no products


def network_of(model: nn.Module, inputs: Any) -> Network:
    """Shapes of a model's parameters and how often one input row uses each; the model is in eval mode."""
    counted = _Uses(model)
    uses = counted.of(inputs)
    return Network({name: tuple(p.shape) for name, p in model.named_parameters()}, uses, counted.products)


def trace_network(model: nn.Module, inputs: Any) -> Network:
    """The same from a copy of a model in any mode and precision, and inputs of any number of rows."""
    copy = copy_of(model).float().eval()
    return network_of(copy, one_row(inputs, copy))


def is_transposed(view: Tensor, weight: Tensor) -> bool:
    """Whether a view of a weight, which may be square, is the weight transposed."""
    return view.ndim == 2 and (view.shape, view.stride()) != (weight.shape, weight.stride())


class _Products(TorchFunctionMode):
    """Multiply-accumulates of products that a forward pass makes itself, with no layer.

    With a weight: per weight entry, in `uses`. Of activations with each other, as in attention: in `between`, per
    entry along the input axis of the weight that reads the last result; what none reads is not counted.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.places = {p.untyped_storage().data_ptr(): (name, p) for name, p in model.named_parameters() if p.ndim > 1}
        self.uses: dict[str, int] = {}
        self.between: dict[str, tuple[int, int]] = {}
        self.waiting, self.last = 0, 0  # products of activations since the last weight, entries of the last one

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        kind = getattr(func, "__name__", "").strip("_")
        if kind in ADDED_FUNCTIONS:
            args = args[1:]
        if kind in (*LAYER_FUNCTIONS, *MATRIX_FUNCTIONS, *ADDED_FUNCTIONS) and len(args) > 1:
            first, second = args[:2]
            if kind not in LAYER_FUNCTIONS:
                self._add(first, result.numel() * first.shape[-1])
                self._add(second, result.numel() * first.shape[-1])
                self._wait(result, first, second)
            else:
                outer = first if "transpose" in kind else result
                self._add(second, outer.numel() * second[0].numel())
            self._read(first, second, 1 if kind == "linear" else 0)
        elif kind == "scaled_dot_product_attention" and len(args) > 2:
            tokens = args[1].shape[-2]
            self.waiting += tokens * (args[0].numel() + result.numel())
            self.last = result.numel()
        return result

    def _wait(self, result: Tensor, first: Tensor, second: Tensor) -> None:
        """Remember a product of two activations until a weight reads it; an outer product only scales."""
        weights = any(tensor.untyped_storage().data_ptr() in self.places for tensor in (first, second))
        if not weights and first.shape[-1] > 1:
            self.waiting += result.numel() * first.shape[-1]
            self.last = result.numel()

    def _read(self, given: Tensor, weight: Any, axis: int) -> None:
        found = self.places.get(weight.untyped_storage().data_ptr()) if isinstance(weight, Tensor) else None
        if found is None or not self.waiting or given.numel() != self.last or weight.ndim != 2:
            return
        name, p = found
        axis = 1 - axis if is_transposed(weight, p) else axis
        if self.waiting % p.shape[axis] == 0:
            before = self.between.get(name, (axis, 0))[1]
            self.between[name] = (axis, before + self.waiting // p.shape[axis])
        self.waiting = self.last = 0

    def _add(self, weight: Any, products: int) -> None:
        found = self.places.get(weight.untyped_storage().data_ptr()) if isinstance(weight, Tensor) else None
        if found is not None:
            name, p = found
            self.uses[name] = self.uses.get(name, 0) + products // max(p.numel(), 1)


class _Uses:
    """Multiply-accumulates per weight entry: output positions of a convolution or linear layer, tokens of attention.

    Every product of a weight and an input counts. Layers of which that is not known are named in a warning.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.module_names = {module: name for name, module in model.named_modules()}
        self.uses: dict[str, int] = {}
        self.products: dict[str, tuple[int, int]] = {}
        self.seen: dict[nn.Module, None] = {}

    @torch.no_grad()
    def of(self, inputs: Any) -> dict[str, int]:
        hooks = [m.register_forward_hook(self._note, with_kwargs=True) for m in self.model.modules()]
        functions = _Products(self.model)
        try:
            with functions:
                call(self.model, inputs)
        except Exception as error:
            raise ValueError(
                f"{type(self.model).__name__} does not run on the example inputs ({type(error).__name__}: {error}); "
                f"pass example_inputs= that model(example_inputs) accepts. It is a {describe(self.model)}"
            ) from error
        finally:
            for handle in hooks:
                handle.remove()
        self.uses |= {name: count for name, count in functions.uses.items() if name not in self.uses}
        self.products = functions.between
        self._name_what_is_not_counted()
        return self.uses

    def _note(self, module: nn.Module, received: tuple, named: dict[str, Any], output: Any) -> None:
        self.seen[module] = None
        given = next((value for value in (*received, *named.values()) if isinstance(value, Tensor)), None)
        if isinstance(module, TRANSPOSED):
            self._add(module, "weight", given.numel() // module.weight.shape[0])
        elif isinstance(module, LAYERS):
            self._add(module, "weight", output.numel() // module.weight.shape[0])
        elif isinstance(module, nn.MultiheadAttention):
            self._add_attention(module, received, named)
        elif isinstance(module, (nn.RNNBase, nn.RNNCell, nn.LSTMCell, nn.GRUCell)) and given is not None:
            for leaf, p in module.named_parameters(recurse=False):
                if p.ndim > 1:
                    self._add(module, leaf, given.numel() // module.input_size)

    def _add_attention(self, module: nn.MultiheadAttention, received: tuple, named: dict[str, Any]) -> None:
        order = ("query", "key", "value")
        tokens = [
            (received[i] if i < len(received) else named[name]).numel() // size
            for i, (name, size) in enumerate(zip(order, (module.embed_dim, module.kdim, module.vdim), strict=True))
        ]
        if module.in_proj_weight is not None:  # the three projections lie in one tensor
            self._add(module, "in_proj_weight", sum(tokens) // 3)
        else:
            for letter, count in zip("qkv", tokens, strict=True):
                self._add(module, f"{letter}_proj_weight", count)
        self.seen[module.out_proj] = None  # is not called as a layer
        self._add(module.out_proj, "weight", tokens[0])

    def _add(self, module: nn.Module, leaf: str, count: int) -> None:
        weight = getattr(module, leaf)
        name = self.names.get(id(weight))
        if name is None:  # computed from parameters of the layer's own: a parametrisation
            alike = [p for p in module.parameters() if p.shape == weight.shape]
            name = self.names[id(alike[-1])] if alike else None
        if name is not None:
            self.uses[name] = self.uses.get(name, 0) + count

    def _name_what_is_not_counted(self) -> None:
        names = []
        for module in self.seen:
            inside = list(module.named_parameters(recurse=isinstance(module, LAYERS)))
            tensors = [p for leaf, p in inside if p.ndim > 1 and p.shape[0] > 1]
            if (
                tensors
                and not isinstance(module, LOOKUPS)
                and not any(self.names[id(p)] in self.uses for p in tensors)
            ):
                names.append(f"{self.module_names[module] or 'the model itself'} ({type(module).__name__})")
        if names:
            logger.warning(
                "the multiply-accumulates of %s are not known and not counted; budgets and reports are of the rest, "
                "and no units are found inside, of the experts of a mixture, say",
                ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else ""),
            )
