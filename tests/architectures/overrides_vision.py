"""Configuration entries of vision models that the rules do not reach: lists with an entry a stage."""
from __future__ import annotations

from .rules import Ratios, Value

PYRAMID: dict[str, Value] = {
    "num_encoder_blocks": 2, "depths": (1, 1), "hidden_sizes": (16, 32), "num_attention_heads": (1, 2),
    "strides": (4, 2), "mlp_ratios": Ratios((16, 32), (7, 5)), "image_size": 32,
}
SWIN: dict[str, Value] = {"depths": (2, 1), "num_heads": (2, 4), "window_size": 2, "image_size": 32}
RESIDUAL: dict[str, Value] = {"embedding_size": 8, "hidden_sizes": (16, 32), "depths": (1, 1)}
CONVNEXT: dict[str, Value] = {"hidden_sizes": (12, 20), "depths": (1, 1), "num_stages": 2, "image_size": 32}
LCNET: list[Value] = [[[3, 16, 24, 1, False]], [[3, 24, 24, 1, False]], [[3, 24, 40, 2, True]],
                      [[5, 40, 40, 1, False]], [[5, 40, 48, 1, True]]]

VISION: dict[str, dict[str, Value]] = {
    "bit": RESIDUAL | {"num_groups": 4},
    "convnext": CONVNEXT,
    "convnextv2": CONVNEXT,
    "cvt": {"embed_dim": (16, 32, 48), "num_heads": (1, 2, 4), "depth": (1, 2, 3),
            "mlp_ratio": Ratios((16, 32, 48))},
    "dinov3_convnext": {"hidden_sizes": [12, 20, 28, 36], "depths": [1, 1, 1, 1], "image_size": 32},
    "donut-swin": SWIN,
    "efficientnet": {"kernel_sizes": (3, 5), "in_channels": (32, 16), "out_channels": (16, 24), "strides": (1, 2),
                     "num_block_repeats": (1, 2), "expand_ratios": (1, 6), "depth_coefficient": 1.0,
                     "width_coefficient": 0.025,
                     "depth_divisor": 8, "hidden_dim": 32, "image_size": 32},
    "focalnet": {"depths": (1, 1), "focal_levels": (2, 2), "focal_windows": (3, 3), "hidden_sizes": (32, 64),
                 "image_size": 32},
    "hgnet_v2": RESIDUAL | {"hidden_sizes": (32, 40), "stem_channels": (3, 16, 24), "stage_in_channels": (24, 32),
                            "stage_mid_channels": (8, 12), "stage_out_channels": (32, 40), "stage_num_blocks": (1, 1),
                            "stage_downsample": (False, True), "stage_downsample_strides": (2, 2),
                            "stage_light_block": (False, True), "stage_kernel_size": (3, 5),
                            "stage_numb_of_layers": (2, 2)},
    "hiera": {"image_size": (32, 32), "depths": (1, 1), "num_heads": (2, 4), "num_query_pool": 1,
              "masked_unit_size": (4, 4), "masked_unit_attention": (True, False)},
    "levit": {"hidden_sizes": (16, 24, 40), "num_attention_heads": (2, 2, 4), "depths": (1, 1, 1), "key_dim": (8, 8, 8),
              "mlp_ratio": Ratios((16, 24, 40), (7, 6, 5)), "patch_size": 16, "image_size": 64},
    "lw_detr_vit": {"pretrain_image_size": 16, "num_windows": 4, "window_block_indices": (0,)},
    "maskformer-swin": SWIN,
    "mobilenet_v1": {"depth_multiplier": 0.125, "image_size": 32},
    "mobilenet_v2": {"depth_multiplier": 0.125, "image_size": 32},
    "mobilevit": {"hidden_sizes": (16, 24, 32), "neck_hidden_sizes": (8, 8, 16, 16, 24, 32, 40), "patch_size": 2,
                  "image_size": 128},
    "mobilevitv2": {"n_attn_blocks": (1, 1, 1), "base_attn_unit_dims": (64, 96, 128), "width_multiplier": 0.25,
                    "ffn_multiplier": 7, "patch_size": 2, "image_size": 64},
    "poolformer": {"num_encoder_blocks": 2, "depths": (1, 1), "hidden_sizes": (32, 64), "patch_sizes": (7, 3),
                   "strides": (4, 2), "padding": (2, 1), "image_size": 32},
    "pp_lcnet": {"block_configs": LCNET, "class_expand": 56},
    "pp_lcnet_v3": {"block_configs": LCNET},
    "pp_lcnet_v4": {"stem_channels": (3, 16, 24), "block_configs": [
        [[3, 24, 24, 1, True]], [[3, 24, 24, 1, False]], [[3, 24, 40, [2, 1], False]], [[3, 40, 48, [2, 1], True]]]},
    "pvt": PYRAMID | {"patch_sizes": (4, 2), "sequence_reduction_ratios": (2, 1)},
    "pvt_v2": PYRAMID | {"patch_sizes": (7, 3), "sr_ratios": (2, 1)},
    "regnet": RESIDUAL | {"groups_width": 8},
    "resnet": RESIDUAL,
    "rf_detr_dinov2": {"num_windows": 2},
    "rt_detr_resnet": RESIDUAL,
    "sapiens2": {"num_key_value_heads_per_layer": [4, 2]},
    "segformer": PYRAMID | {"patch_sizes": (7, 3), "sr_ratios": (2, 1)},
    "swiftformer": {"embed_dims": (16, 32), "depths": (2, 2), "downsamples": (True, True), "image_size": 32},
    "swin": SWIN,
    "swinv2": SWIN | {"pretrained_window_sizes": (0, 0)},
    "textnet": {"conv_layer_kernel_sizes": [[[3, 3]], [[3, 1]]], "conv_layer_strides": [[2], [1]],
                "hidden_sizes": (8, 16, 24), "stem_out_channels": 8, "image_size": (32, 32)},
    "uvdoc_backbone": {"resnet_head": ((3, 8), (8, 8)), "stage_configs": (((24, 1),), ((24, 2), (24, 3))),
                       "resnet_configs": (((8, 8, 1, False),), ((8, 16, 1, True),), ((16, 24, 1, True),))},
    "vitdet": {"pretrain_image_size": 16, "window_block_indices": (0,), "window_size": 2,
               "residual_block_indices": (1,)},
    "vitpose_backbone": {"image_size": (16, 16), "patch_size": (8, 8), "num_experts": 1},
}
