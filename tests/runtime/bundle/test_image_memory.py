"""The memory of images and scenes, compared with what a model keeps."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from fakes.watched_backend import picture

from fusion_edge.runtime import load
from fusion_edge.runtime.bundle.image_memory import START_TOKENS, image_memory
from fusion_edge.runtime.bundle.reader import open_bundle


def test_memory_is_what_a_scene_keeps(tiny_bundle: Path) -> None:
    with load(tiny_bundle, device="cpu") as fusion:
        fusion.look(picture(), "Where?")
        (entry,) = fusion.pipeline.images._entries
        assert entry.image is not None
        assert entry.prefix is not None
        (aligned,) = entry.image.alignments.values()
        arrays = [entry.image.crops, entry.image.local_pixels, entry.image.global_features]
        arrays += [aligned.latents, aligned.keys, aligned.values]
        memory = image_memory(fusion.manifest)
        assert memory.cached_image == sum(np.asarray(array).nbytes for array in arrays)
        assert entry.prefix.length <= START_TOKENS + fusion.manifest.image_side**2
        whole = sum(np.asarray(tensor.numpy()).nbytes for tensor in entry.prefix.memory.values())
        tokens = min(START_TOKENS + fusion.manifest.image_side**2, fusion.max_context)
        assert memory.scene_prefix * fusion.max_context == whole * tokens


def test_cuda_reserves_a_context(tiny_bundle: Path) -> None:
    manifest = open_bundle(tiny_bundle).manifest
    reserved = image_memory(dataclasses.replace(manifest, target="cuda")).scene_prefix
    assert reserved == manifest.model.language.cache_values * manifest.max_context * 4
