"""The interface of a denoiser: all that trainer, pipeline, sharding, planning and sampling use of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pixelgen_kernels import Ops, select
from torch import Tensor, nn

from pixelgen.conditions import Condition

ChannelOrder = Literal["first", "last"]
Prediction = Literal["x", "velocity"]
Kernels = Literal["auto", "eager"]


class Denoiser(nn.Module, ABC):
    """A network on noisy pixel patches that predicts the clean ones, or the velocity towards them.

    t = 0 is noise and t = 1 is data: x_t = t x + (1 - t) noise. A family whose published code has it
    otherwise converts inside its own class.

    Attributes:
        prediction: ``"x"``, the clean patches, or ``"velocity"``, x - noise.
        class_table: key in ``state_dict`` of the class embedding, whose last row is the null label; None for
            a model without one.
        input_order: whether the channel is the first or the last index of an input patch's values.
        output_order: the same for an output patch.
        config: the architecture: a frozen dataclass with ``image_size``, ``channels``, ``num_classes``,
            ``patch_size``, ``width`` (of the tapped features) and ``depth`` (number of blocks).
        ops: the kernels in use.
    """

    prediction: Prediction = "x"
    class_table: ClassVar[str | None] = None
    input_order: ClassVar[ChannelOrder] = "first"
    output_order: ClassVar[ChannelOrder] = "last"

    def __init__(self, config: Any, kernels: Kernels = "auto") -> None:
        super().__init__()
        self.config = config
        self.ops: Ops = select(kernels)

    # --- what a family defines ---

    @abstractmethod
    def forward_tokens(
        self,
        tokens: Tensor,
        grid: tuple[int, int],
        t: Tensor,
        condition: Condition,
        tap: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The prediction for noisy patches.

        Args:
            tokens: (B, T, P*P*channels) noisy patches in raster order, values in ``input_order``.
            grid: rows and columns of the patches; T is their product.
            t: (B,) time in [0, 1].
            condition: such as ``{"label": (B,)}``.
            tap: L in [0, depth): also return the features that go into block L.

        Returns:
            The prediction (B, T, P*P*channels), values in ``output_order``; the features (B, T, width), or
            None without ``tap``.

        Raises:
            ValueError: a grid that this model cannot have, or no such block.
        """

    @abstractmethod
    def null(self, condition: Condition) -> Condition:
        """The null condition of classifier-free guidance, for as many images and of the same shapes."""

    def example_condition(self, batch_size: int) -> Condition:
        """Any condition for so many images, on the default device, to count and measure with."""
        return {"label": torch.zeros(batch_size, dtype=torch.int64)}

    @abstractmethod
    def fsdp_units(self) -> list[nn.Module]:
        """The blocks in the order in which they run: what is sharded, compiled and checkpointed one by one.

        Each has an attribute ``checkpointing``, see ``checkpoint_blocks``.
        """

    @abstractmethod
    def balance_weight(self) -> Tensor:
        """The parameter by whose gradients loss terms are balanced: the last linear layer's weight."""

    def adaln_modules(self) -> list[nn.Module]:
        """AdaLN layers of an image's condition, whose weights a training step packs into one product."""
        return []

    def modules_in_ops(self) -> list[nn.Module]:
        """Modules of which an op reads the weights, and which are never called themselves."""
        return []

    @classmethod
    def convert(cls, published: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The ``state_dict`` of this class from the published code's; unknown names stay as they are."""
        return dict(published)

    @classmethod
    def options_of(cls, state: Mapping[str, Tensor]) -> dict[str, bool | str] | None:
        """What the names and shapes of a state dict tell of the model that it was taken from.

        Returns:
            Fields of the architecture that change the parameters and have few values, each with the one that
            this state was made with; None where it is of no model of this class.
        """
        return None

    def tables(self) -> dict[str, Tensor]:
        """Buffers of ``state_dict`` that follow from the configuration, so that they are never loaded."""
        return {}

    def resized(
        self, name: str, given: Tensor, own: Tensor, classes: Mapping[int, int]
    ) -> tuple[Tensor, str] | None:
        """A tensor of another model of this family in the shape that it has here, and what was done.

        Args:
            name: its key in ``state_dict``.
            given: its value there.
            own: that of the fresh model here; holds values only where ``name`` is ``class_table``.
            classes: classes here -> the same ones there.

        Returns:
            None where it cannot be brought into this shape.
        """
        return None

    # --- what all families share ---

    @staticmethod
    def _other_classes(given: Tensor, own: Tensor, classes: Mapping[int, int]) -> tuple[Tensor, str] | None:
        """``resized`` of a class table: rows of known classes and the null label are kept."""
        if given.shape[1] != own.shape[1]:
            return None
        table = own.clone()
        table[-1] = given[-1]
        for here, there in classes.items():
            table[here] = given[there]
        return table, f"{len(classes)} classes kept, {len(own) - 1 - len(classes)} new"

    def forward(
        self, x_t: Tensor, t: Tensor, condition: Condition | Tensor, tap: int | None = None, **inputs: Tensor
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Predicts from a noisy image.

        Args:
            x_t: (B, channels, H, W) noisy image.
            t: (B,) time in [0, 1].
            condition: as in ``forward_tokens``; a tensor (B,) is short for ``{"label": tensor}``.
            tap: as in ``forward_tokens``.
            **inputs: what a family's ``forward_tokens`` takes besides.

        Returns:
            The prediction (B, channels, H, W), and with ``tap`` the features.

        Raises:
            ValueError: an image of another shape.
        """
        P, channels = self.config.patch_size, self.config.channels
        if x_t.ndim != 4 or x_t.shape[1] != channels or x_t.shape[2] % P or x_t.shape[3] % P:
            raise ValueError(
                f"{type(self).__name__}: x_t must have shape (B, {channels}, H, W), "
                f"H and W multiples of {P}, got {tuple(x_t.shape)}"
            )
        height, width = x_t.shape[2:]
        if isinstance(condition, Tensor):
            condition = {"label": condition}
        tokens = self.ops.patchify(x_t, P, channel_order=self.input_order)
        grid = height // P, width // P
        output, features = self.forward_tokens(tokens, grid, t, condition, tap, **inputs)
        output = self.ops.unpatchify(output, P, (height, width), channel_order=self.output_order)
        return output if features is None else (output, features)

    def checkpoint_blocks(self, mode: Literal["none", "selective", "full"]) -> None:
        """Chooses what a block's backward pass computes again instead of keeping it.

        Args:
            mode: ``"none"``; ``"selective"``: all but the outputs of matrix products and attention; or
                ``"full"``: everything but the block's input.
        """
        for block in self.fsdp_units():
            block.checkpointing = mode  # type: ignore[assignment]

    def compile_blocks(self) -> None:
        """Compiles the forward pass of every block by itself; equal blocks share their code."""
        self._compile(self.fsdp_units())

    @staticmethod
    def _compile(blocks: list[nn.Module]) -> None:
        """Hooks on the blocks, such as those that gather sharded weights, stay outside."""
        # Blocks differ in dropout, tokens and pending branch, in training and in evaluation: more variants
        # than PyTorch compiles of one function by default, after which it would run the others uncompiled.
        torch._dynamo.config.recompile_limit = max(32, torch._dynamo.config.recompile_limit)
        for block in blocks:
            block.forward = torch.compile(block.forward)
