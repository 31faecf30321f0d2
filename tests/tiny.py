"""A model and a batch small enough for milliseconds. Plain functions, so that spawned ranks can import them too."""

import torch

from hf_msn import MSNConfig, MSNForPreTraining

TINY_RUN = (  # on the command line
    "--image_size 8 --patch_size 4 --focal_size 4 --focal_views 1 --hidden_size 16 --num_hidden_layers 1 "
    "--num_attention_heads 2 --intermediate_size 16 --projection_hidden_dim 8 --projection_dim 8 --use_cpu "
    "--report_to none --disable_tqdm true"
).split()


def tiny_config(**fields) -> MSNConfig:
    """16 patches of 4 pixels, width 32, 2 layers, 8 prototypes; `fields` differ from that."""
    return MSNConfig(
        **{
            "image_size": 16,
            "patch_size": 4,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "projection_hidden_dim": 32,
            "projection_dim": 16,
            "num_prototypes": 8,
            "mask_ratio": 0.25,
            "use_sinkhorn": False,
            **fields,
        }
    )


def tiny_model(seed: int = 0, **fields) -> MSNForPreTraining:
    """In training mode, where a model under test begins."""
    torch.manual_seed(seed)
    return MSNForPreTraining(tiny_config(**fields)).train()


def tiny_batch(batch_size: int = 4, anchor_views: int = 1, focal_views: int = 2, seed: int = 1) -> dict:
    """Views of random images: global ones of 16 pixels, focal ones of 8."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(batch_size, 3, 16, 16, generator=generator),
        "anchor_pixel_values": torch.randn(batch_size, anchor_views, 3, 16, 16, generator=generator),
        "focal_pixel_values": torch.randn(batch_size, focal_views, 3, 8, 8, generator=generator),
    }
