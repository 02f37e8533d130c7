"""A decoder-only transformer to train: one definition for predictive coding and for backpropagation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .distributions import Distribution
from .head import Head
from .nn import Attention, Linear
from .recompute import checkpoint_contexts


class Block(nn.Module):
    """A pre-LayerNorm transformer block.

    Its value nodes are the attention weights and the outputs of its linear layers, but for the product that makes
    queries, keys and values. Arguments as in `Transformer`.
    """

    def __init__(self, width: int, heads: int, attention: Distribution | bool = True) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads, causal=True, node=attention)
        self.up, self.down = Linear(width, 4 * width), Linear(4 * width, width)

    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        """The block's output for x ``[B, N, width]``, in x's shape and dtype. segments: as in `Attention`."""
        x = x + self.attn(self.ln1(x), segments=segments)
        return x + self.down(F.gelu(self.up(self.ln2(x))))


class Transformer(nn.Module):
    """A decoder-only transformer language model with learned positions.

    The layout and the initialisation (standard deviation 0.02) are those of GPT-2 (Radford et al. 2019).

    Arguments:
        vocabulary, width, heads, blocks, context: the sizes; context in tokens.
        attention: the node of the attention weights, as ``node`` in `Attention`.
        separator: the token that begins each document of a packed sequence. Attention then stays within a document,
            and positions count from its beginning, or from the sequence's if the document began earlier. The logits
            are those of the documents one by one. So are F and its gradients where precision and step are numbers;
            "auto" sets one precision and one step for the whole sequence.
        checkpointing: compute each block again for its backward passes (``torch.utils.checkpoint``), and hold only its
            input and its states.

    Raises ValueError for sizes below 1, a width that is no multiple of heads, or a separator that is no token.
    """

    def __init__(
        self,
        vocabulary: int,
        width: int = 128,
        heads: int = 4,
        blocks: int = 4,
        context: int = 64,
        *,
        attention: Distribution | bool = True,
        separator: int | None = None,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if min(vocabulary, width, heads, blocks, context) < 1:
            raise ValueError(f"{(vocabulary, width, heads, blocks, context)=}: give whole numbers of at least 1")
        if width % heads:
            raise ValueError(f"width={width} is no multiple of heads={heads}: give a width that the heads share evenly")
        if separator is not None and not 0 <= separator < vocabulary:
            raise ValueError(f"separator={separator}: give a token, 0 to {vocabulary - 1}, or None")
        self.context, self.separator, self.checkpointing = context, separator, checkpointing
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads, attention) for _ in range(blocks))
        self.ln = nn.LayerNorm(width)
        self.head = Head(width, vocabulary, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                last = name.endswith(("out_proj.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * blocks) ** 0.5 if last else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[B, N, vocabulary]`` of the token after each token, in the dtype of the weights.

        tokens: int64 ``[B, N]``, N <= context, on the device of the weights. Raises ValueError for a longer sequence.
        """
        if tokens.shape[1] > self.context:
            raise ValueError(f"{tokens.shape[1]} tokens: the model's context is {self.context}")
        places, segments = torch.arange(tokens.shape[1], device=tokens.device), None
        if self.separator is not None:
            begins = tokens == self.separator
            segments = begins.cumsum(-1, dtype=torch.int32)
            places = places - (places * begins).cummax(-1).values
        x = self.tokens(tokens) + self.positions(places)
        for block in self.blocks:
            if self.checkpointing:
                x = checkpoint(block, x, segments, use_reentrant=False, context_fn=checkpoint_contexts)
            else:
                x = block(x, segments)
        return self.head(self.ln(x))
