"""``WorkerWrapperBase``: workers extended by inheritance, calls passed on, custom pipelines."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.diffusion.fake_pipeline import Conflicting, FakePipeline, WholePipeline
from tests.diffusion.helpers import FAKE, fake_config
from vllm_omni.diffusion.worker.diffusion_worker import (
    CustomPipelineWorkerExtension,
    DiffusionWorker,
    WorkerWrapperBase,
)
from vllm_omni.errors import ConfigError, RequestError


class MyCustomExtension:
    """As in the guide."""

    def custom_method(self) -> str:
        return "custom_result"

    def another_method(self, data: Any) -> Any:
        # Access worker internals via self
        return type(self.model_runner.pipeline).__name__, data


class OwnReInit(CustomPipelineWorkerExtension):
    """An extension that builds on the package's own."""

    def re_init_twice(self, args: dict[str, Any]) -> None:
        self.re_init_pipeline(args)
        self.re_init_pipeline(args)


@pytest.fixture
def config() -> Any:
    return fake_config(worker_extension_cls=None)


@pytest.fixture
def wrapper(config: Any) -> Iterator[WorkerWrapperBase]:
    wrapper = WorkerWrapperBase(gpu_id=0, od_config=config, worker_extension_cls=MyCustomExtension)
    yield wrapper
    wrapper.worker.shutdown()


def test_the_extension_s_methods_are_the_worker_s(wrapper: WorkerWrapperBase) -> None:
    assert wrapper.worker.custom_method() == "custom_result"
    assert wrapper.worker.another_method(3) == ("FakePipeline", 3)
    assert isinstance(wrapper.worker, DiffusionWorker)
    assert isinstance(wrapper.worker, MyCustomExtension)
    assert isinstance(wrapper.worker, CustomPipelineWorkerExtension)
    assert "custom_method" not in dir(DiffusionWorker)


def test_calls_and_attributes_are_passed_on(wrapper: WorkerWrapperBase) -> None:
    assert wrapper.execute_method("custom_method") == "custom_result"
    assert wrapper.execute_method("another_method", data=1) == ("FakePipeline", 1)
    assert wrapper.custom_method() == "custom_result"
    assert wrapper.rank == 0
    with pytest.raises(AttributeError):
        _ = wrapper.nothing
    with pytest.raises(RequestError, match="no method 'nothing'"):
        wrapper.execute_method("nothing")


def test_the_pipeline_can_be_replaced(wrapper: WorkerWrapperBase) -> None:
    old = wrapper.model_runner.pipeline
    assert isinstance(old, FakePipeline)
    wrapper.worker.re_init_pipeline({"pipeline_class": f"{FAKE}.WholePipeline"})
    assert isinstance(wrapper.model_runner.pipeline, WholePipeline)
    assert wrapper.model_runner.by_steps is False
    with pytest.raises(ConfigError, match="Missing"):
        wrapper.worker.re_init_pipeline({"pipeline_class": f"{FAKE}.Missing"})


def test_without_extensions_the_worker_is_plain(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And loads the model itself, in the configured format."""
    loaded = []
    monkeypatch.setattr(DiffusionWorker, "load_model", lambda self, load_format=None: loaded.append(load_format))
    plain = fake_config(worker_extension_cls=None, custom_pipeline_args=None)
    wrapper = WorkerWrapperBase(gpu_id=0, od_config=plain)
    wrapper.worker.shutdown()
    assert type(wrapper.worker) is DiffusionWorker
    assert loaded == [None]


def test_an_extension_may_build_on_the_package_s_own(config: Any) -> None:
    wrapper = WorkerWrapperBase(gpu_id=0, od_config=config, worker_extension_cls=OwnReInit)
    wrapper.execute_method("re_init_twice", {"pipeline_class": f"{FAKE}.WholePipeline"})
    assert isinstance(wrapper.model_runner.pipeline, WholePipeline)
    wrapper.worker.shutdown()


@pytest.mark.parametrize("extension", [Conflicting, f"{FAKE}.Conflicting"])
def test_a_name_the_worker_already_has_is_refused(config: Any, extension: Any) -> None:
    with pytest.raises(ConfigError, match="'load_model' is already a name of DiffusionWorker"):
        WorkerWrapperBase(gpu_id=0, od_config=config, worker_extension_cls=extension)


@pytest.mark.parametrize("name", ["NoModule", "nowhere.Class", f"{FAKE}.Missing", f"{FAKE}.CHANNELS"])
def test_an_extension_that_cannot_be_found(config: Any, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        WorkerWrapperBase(gpu_id=0, od_config=config, worker_extension_cls=name)
    assert caught.value.details["field"] == "worker_extension_cls"
