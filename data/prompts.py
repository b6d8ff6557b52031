"""The two kinds of prompts that MmAP's Figure 5 compares its own with. `common` passes these names on.

Both have the interface of `mmap.MmAP`: made for prompts of n_ctx vectors in n_layers layers of width d_text and d_image.
"""
import torch
from torch import nn


class Joint(nn.Module):
    """Figure 5a: text and image prompts trained jointly, without a link."""

    def __init__(self, n_ctx, d_text, d_image, n_layers):
        super().__init__()
        self.text = nn.Parameter(0.02 * torch.randn(n_layers, n_ctx, d_text))
        self.image = nn.Parameter(0.02 * torch.randn(n_layers, n_ctx, d_image))

    def text_prompts(self):
        """[K, b, d_l]"""
        return self.text

    def image_prompts(self):
        """[K, b, d_v]"""
        return self.image


class MLP(nn.Module):
    """Figure 5b: text and image prompts from one source by a linear map a modality and layer."""

    def __init__(self, n_ctx, d_text, d_image, n_layers, width=256):
        super().__init__()
        self.source = nn.Parameter(0.02 * torch.randn(n_layers, n_ctx, width))
        self.to_text = nn.ModuleList(nn.Linear(width, d_text) for _ in range(n_layers))
        self.to_image = nn.ModuleList(nn.Linear(width, d_image) for _ in range(n_layers))

    def text_prompts(self):
        return torch.stack([layer(source) for layer, source in zip(self.to_text, self.source)])

    def image_prompts(self):
        return torch.stack([layer(source) for layer, source in zip(self.to_image, self.source)])
