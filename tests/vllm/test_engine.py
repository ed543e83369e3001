"""One real engine in this process, and what it refuses: by name, before anything is written."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch

from support.vllm_fleet import make_model
from weightsync import Job, Source
from weightsync.demo.model import build_model, model_config
from weightsync.demo.vllm.settings import engine_environment
from weightsync.errors import (
    ConfigError,
    LayoutError,
    PeerLostError,
    TornError,
    TransferTimeoutError,
    UnknownTensorError,
)

os.environ.update(engine_environment())
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine is ours to look into

from vllm import LLM, SamplingParams
from vllm.distributed.weight_transfer import factory
from vllm.distributed.weight_transfer.base import ModuleSource

from weightsync.integrations.vllm import attach, engine, refit, register, twin
from weightsync.integrations.vllm.trainer import WeightSyncTrainerInitInfo

PROMPTS = [[3, 14, 15, 92, 65], [84, 104, 101, 32]]
NUM_TOKENS = 12


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = make_model(tmp_path_factory.mktemp("model"), "qwen3_moe", "float32")
    made = LLM(
        str(folder),
        dtype="float32",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=4,
        weight_transfer_config={"backend": "weightsync"},
    )
    yield made
    worker_engine(made).shutdown()
    del made
    gc.collect()


@pytest.fixture
def trainer() -> Any:
    """Weights that no other test has published."""
    torch.manual_seed(int.from_bytes(os.urandom(4), "little"))
    model = build_model(model_config("qwen3_moe"), torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def worker_engine(llm: LLM) -> Any:
    return llm.llm_engine.model_executor.driver_worker.worker.weight_transfer_engine


def generate(llm: LLM) -> list[list[int]]:
    sampling = SamplingParams(
        temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, detokenize=False
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    made = llm.generate(prompts, sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in made]


def expected(model: Any) -> list[list[int]]:
    """What transformers says."""
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            for _ in range(NUM_TOKENS):
                best = model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)
                ids = torch.cat([ids, best], 1)
        found.append(ids[0, len(prompt) :].tolist())
    return found


def fingerprint(model: Any) -> dict[str, tuple[int, int]]:
    return {name: (p.data_ptr(), p._version) for name, p in model.named_parameters()}


def test_registering_twice_is_harmless() -> None:
    register()
    register()
    assert "weightsync" in factory.WeightTransferEngineFactory._registry
    assert "weightsync" in factory.WeightTransferTrainerFactory._registry


def test_the_layout_is_recorded_without_touching_the_model(llm: LLM) -> None:
    worker = llm.llm_engine.model_executor.driver_worker.worker
    before = {
        name: (p.data_ptr(), p._version) for name, p in worker.model_runner.model.named_parameters()
    }
    tokens = generate(llm)
    tensors = engine._canonical(model_config("qwen3_moe"), torch.float32)
    recording = twin.record_worker(worker.vllm_config, tensors)
    after = {
        name: (p.data_ptr(), p._version) for name, p in worker.model_runner.model.named_parameters()
    }
    assert before == after
    assert generate(llm) == tokens
    # On CPUs vLLM has emptied what it packed; the recording still knows the loader's format.
    assert recording.parameters["model.layers.0.self_attn.qkv_proj.weight"].shape == (320, 128)
    assert worker.model_runner.model.model.layers[0].self_attn.qkv_proj.weight.numel() == 0


def test_versions_one_after_the_other(llm: LLM, trainer: Any) -> None:
    with Job.start() as job:
        attach([llm], job=job)
        with Source(trainer, job=job, rank=0, world_size=1) as source:
            for number in (1, 2, 3):
                with torch.no_grad():
                    for parameter in trainer.parameters():
                        parameter.mul_(1.0 + 0.01 * number)
                source.publish()
                assert refit(llm) == number
                assert llm.llm_engine.get_weight_version() == str(number)
                assert generate(llm) == expected(trainer)
            with pytest.raises(TransferTimeoutError):
                refit(llm, timeout_s=0.3)
            assert generate(llm) == expected(trainer)  # still the last one


def test_an_engine_that_fails_half_way_computes_nothing(
    llm: LLM, trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = worker_engine(llm).model
    with Job.start() as job:
        attach([llm], job=job)
        with Source(trainer, job=job, rank=0, world_size=1) as source:
            source.publish()
            pointers = {name: at for name, (at, _) in fingerprint(model).items()}
            method = type(model.model.layers[1].mlp.experts.routed_experts.quant_method)
            real = method.process_weights_after_loading

            def fails(self: Any, layer: Any) -> None:
                real(self, layer)
                raise RuntimeError("no memory left for packing")

            monkeypatch.setattr(method, "process_weights_after_loading", fails)
            with pytest.raises(TornError, match="no memory left"):
                refit(llm)
            monkeypatch.setattr(method, "process_weights_after_loading", real)
            # Not by generate: vLLM does not survive a step that raises, which is what we want.
            with pytest.raises(TornError):
                worker_engine(llm).model(torch.tensor([1]), torch.tensor([0]))
            replicas = job.status()["replicas"]
            assert [replica["serving"] for replica in replicas.values()] == [False]
            # The next version makes it whole again.
            source.publish()
            refit(llm)
            assert generate(llm) == expected(trainer)
            # Where kernels look is where they looked before, whatever happened in between.
            assert {name: at for name, (at, _) in fingerprint(model).items()} == pointers


def test_vllms_own_trainer_interface(llm: LLM, trainer: Any) -> None:
    class Client:
        """The four routes, called on the engine of this process."""

        def _call(self, route: str, **arguments: Any) -> None:
            llm.llm_engine.collective_rpc(route, kwargs=arguments)

        def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
            self._call("init_weight_transfer_engine", init_info=init_info)

        def start_weight_update(self) -> None:
            self._call("start_weight_update")

        def update_weights(self, update_info: Any) -> None:
            self._call("update_weights", update_info=update_info)

        def finish_weight_update(self, weight_version: str | None = None) -> None:
            self._call("finish_weight_update")
            llm.llm_engine.set_weight_version(str(weight_version))

    made = factory.WeightTransferTrainerFactory.trainer_init(
        WeightSyncTrainerInitInfo(rank=0), client=Client(), source=ModuleSource(trainer)
    )
    try:
        for number in (1, 2):
            with torch.no_grad():
                for parameter in trainer.parameters():
                    parameter.mul_(1.01)
            made.send_weights()
            llm.reset_prefix_cache()
            assert generate(llm) == expected(trainer)
            assert llm.llm_engine.get_weight_version() == str(number)
    finally:
        made.shutdown()
        worker_engine(llm).shutdown()
    with pytest.raises(ConfigError, match="ModuleSource"):
        factory.WeightTransferTrainerFactory.trainer_init(
            WeightSyncTrainerInitInfo(rank=0), client=Client(), source=None
        )


# ---- refused, with nothing written ----


@pytest.fixture
def unchanged(llm: LLM) -> Iterator[None]:
    before = generate(llm)
    yield
    assert generate(llm) == before


@pytest.mark.usefixtures("unchanged")
def test_a_renamed_parameter(llm: LLM, trainer: Any) -> None:
    weights = dict(trainer.named_parameters())
    weights["model.norm.scale"] = weights.pop("model.norm.weight")
    with Job.start() as job:
        attach([llm], job=job)
        with (
            Source(weights, job=job, rank=0, world_size=1) as source,
            pytest.raises(UnknownTensorError, match=r"model\.norm\.(scale|weight)"),
        ):
            source.publish(timeout_s=20.0)


@pytest.mark.usefixtures("unchanged")
def test_a_name_that_the_loader_does_not_know(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vLLM that spells a tensor otherwise than the checkpoint."""
    real = engine._canonical

    def renamed(config: Mapping[str, Any], dtype: torch.dtype) -> Any:
        tensors = real(config, dtype)
        tensors["model.layers.0.self_attn.q_projection.weight"] = tensors.pop(
            "model.layers.0.self_attn.q_proj.weight"
        )
        return tensors

    monkeypatch.setattr(engine, "_canonical", renamed)
    with Job.start() as job, pytest.raises(LayoutError, match="q_proj"):
        attach([llm], job=job)


@pytest.mark.usefixtures("unchanged")
def test_an_unknown_model(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    config = worker_engine(llm).model_config.hf_config
    monkeypatch.setattr(type(config), "model_type", "qwen9")
    with Job.start() as job, pytest.raises(ConfigError, match=r"qwen9.*supported are"):
        attach([llm], job=job)


@pytest.mark.usefixtures("unchanged")
def test_an_unknown_quantization(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    config = worker_engine(llm).model_config.hf_config
    monkeypatch.setattr(config, "quantization_config", {"quant_method": "zipped"}, raising=False)
    with Job.start() as job, pytest.raises(ConfigError, match="zipped"):
        attach([llm], job=job)


@pytest.mark.usefixtures("unchanged")
def test_a_kernel_layout_that_nobody_knows(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    class SecretMethod(UnquantizedLinearMethod):
        pass

    layer = worker_engine(llm).model.model.layers[1].self_attn.o_proj
    monkeypatch.setattr(layer, "quant_method", SecretMethod())
    with (
        Job.start() as job,
        pytest.raises(LayoutError, match=r"layers\.1\.self_attn\.o_proj.*SecretMethod"),
    ):
        attach([llm], job=job)


def test_an_engine_of_another_version(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    made = worker_engine(llm)
    monkeypatch.setattr(engine, "TESTED_VERSIONS", ("0.31",))
    with pytest.raises(LayoutError, match=r"0\.32.*0\.31"):
        type(made)(made.config, made.vllm_config, made.device, made.model)


def test_a_server_of_another_job(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTSYNC_JOB", "unix:/nowhere")
    with Job.start() as job, pytest.raises(ConfigError, match="does not join"):
        attach([llm], job=job)


def test_nobody_at_the_url() -> None:
    with (
        Job.start() as job,
        pytest.raises(PeerLostError, match="VLLM_SERVER_DEV_MODE=1 vllm serve"),
    ):
        attach(["http://127.0.0.1:9"], job=job)
    with Job.start() as job, pytest.raises(ConfigError, match="no URL"):
        attach(["localhost:8000"], job=job)
