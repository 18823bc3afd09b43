"""Layers: proportions, re-weightings, attention, blocks and their state. See docs/nn.md."""

from leapformer.nn.bigbird import BigBirdAttention
from leapformer.nn.blocks import DecoderBlock, EncoderBlock, FeedForward
from leapformer.nn.build import KINDS, MECHANISMS, REGISTRY, build_attention, by_row
from leapformer.nn.clocks import Clocks
from leapformer.nn.conv import ShortConvolution
from leapformer.nn.decay import ChannelDecay, Decay
from leapformer.nn.delta import DeltaRule
from leapformer.nn.feature_maps import FEATURE_MAPS, elu_plus_one
from leapformer.nn.informer import InformerAttention
from leapformer.nn.layer import AttentionLayer, Call, Capabilities, Mechanism
from leapformer.nn.linear import CosformerCrossAttention, LinearAttention
from leapformer.nn.linformer import LinformerAttention
from leapformer.nn.nystromformer import NystromformerAttention
from leapformer.nn.performer import PerformerAttention, RandomFeatures
from leapformer.nn.positions import LearnedPositions, SinusoidalPositions
from leapformer.nn.prior import PriorProportion
from leapformer.nn.proportions import LeapModule, PositionProportion, Proportion, hidden_for_share, leap_parameters
from leapformer.nn.reformer import ReformerAttention
from leapformer.nn.reweighting import REWEIGHTINGS, Cosine, Quadratic, Reweighting
from leapformer.nn.skyformer import SkyformerAttention
from leapformer.nn.softmax import SoftmaxAttention
from leapformer.nn.state import LayerState
from leapformer.nn.subsampling import ConvSubsampling, SubsamplingCache, subsampled_length

__all__ = [
    "KINDS",
    "MECHANISMS",
    "REGISTRY",
    "SkyformerAttention",
    "ReformerAttention",
    "RandomFeatures",
    "PerformerAttention",
    "NystromformerAttention",
    "LinformerAttention",
    "InformerAttention",
    "BigBirdAttention",
    "FEATURE_MAPS",
    "REWEIGHTINGS",
    "AttentionLayer",
    "Call",
    "Capabilities",
    "ChannelDecay",
    "Clocks",
    "ConvSubsampling",
    "CosformerCrossAttention",
    "Cosine",
    "Decay",
    "DecoderBlock",
    "DeltaRule",
    "EncoderBlock",
    "FeedForward",
    "LayerState",
    "LeapModule",
    "LearnedPositions",
    "LinearAttention",
    "Mechanism",
    "PositionProportion",
    "PriorProportion",
    "Proportion",
    "Quadratic",
    "Reweighting",
    "ShortConvolution",
    "SinusoidalPositions",
    "SoftmaxAttention",
    "SubsamplingCache",
    "build_attention",
    "by_row",
    "elu_plus_one",
    "hidden_for_share",
    "leap_parameters",
    "subsampled_length",
]
