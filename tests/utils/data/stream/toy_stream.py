"""A stream of tiny documents, of which each is one window."""

import json
from pathlib import Path

import datasets
import numpy as np
import torch

from utils.config.settings import DataConfig
from utils.data.batch_source import BatchSource
from utils.data.documents import text_digest
from utils.data.stream.batches import Stream
from utils.data.stream.beginning import read_beginning
from utils.data.stream.blocks import StreamSetUp
from utils.parallel.accelerator import build_accelerator

LENGTH, VOCABULARY = 6, 12


def encode(texts: list[str], names: list[str]) -> list[dict]:
    """One window a document, of ids that its hash says."""
    windows = []
    for text, name in zip(texts, names, strict=True):
        ids = np.frombuffer(text_digest(text), dtype=np.uint8)[: LENGTH + 1].astype(np.int64) % VOCABULARY
        windows.append({"ids": ids[:-1], "labels": ids[1:], "documents": name, "text": text, "bytes": len(text)})
    return windows


def write(file: Path, texts: list[str]) -> Path:
    """Write texts as JSON lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def config(*files: Path, **options) -> DataConfig:
    """Settings of a stream, in blocks of about twenty documents."""
    options = {"streaming": True, "block_bytes": 200, "remembered_documents": 1000} | options
    return DataConfig(train=[str(file) for file in files], **options)


def set_up(settings: DataConfig) -> StreamSetUp:
    """Read the beginning of a stream."""
    beginning = read_beginning(settings, seed=3)
    features = datasets.Dataset.from_list(encode(beginning.corpus.train[:1], ["name"])).features
    return StreamSetUp(beginning, encode, features, "toy")


def open_stream(setup: StreamSetUp, folder: Path, global_batch: int = 4, check=lambda: None) -> Stream:
    """Open a stream in this process."""
    accelerator = build_accelerator("no", cpu=True)
    return Stream(setup, folder, accelerator=accelerator, global_batch=global_batch, seed=3, check=check)


def batch_source(rank: int = 0) -> BatchSource:
    """Return a source of batches, which are here the texts of their windows."""
    return BatchSource(
        windows=[],
        collate=lambda windows: [str(window["text"]) for window in windows],
        seed=3,
        rank=rank,
        device=torch.device("cpu"),
        num_workers=0,
        after_epoch=lambda: None,
    )
