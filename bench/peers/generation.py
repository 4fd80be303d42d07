"""Plain generation by distilabel and DataDesigner, for bench/service.py: in a process of their own.

    python bench/peers/generation.py distilabel BASE_URL CALLS IN_FLIGHT

prints one JSON object: calls, seconds of the generation alone (from the first request on, so that
imports and set-up do not count), CPU seconds of all their processes meanwhile. They are installed
in an environment of their own, for their dependencies do not go with ours:

    python3 -m venv ENV && ENV/bin/pip install 'distilabel[openai]' data-designer
    python bench/service.py --peers ENV/bin/python
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from importlib.metadata import version

SYSTEM = "You solve problems step by step." * 20
USER = "Natalia sold clips to 48 of her friends. " * 40


def cpu() -> float:
    """Of this process and of its children that have ended."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(u.ru_utime + u.ru_stime for u in map(resource.getrusage, kinds))


def distilabel(base_url: str, calls: int, in_flight: int) -> tuple[float, float]:
    """Its OpenAI client and task, `in_flight` rows a batch: the loop that its pipelines run.

    Without the pipeline around it, which starts processes and writes every batch to disk.
    """
    from distilabel.models import OpenAILLM
    from distilabel.steps.tasks import TextGeneration

    llm = OpenAILLM(
        model="fake", base_url=base_url, api_key="EMPTY",
        generation_kwargs={"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 256},
    )  # fmt: skip
    task = TextGeneration(llm=llm, input_batch_size=in_flight, system_prompt=SYSTEM)
    task.load()
    rows = [{"instruction": f"{USER}{i}"} for i in range(calls)]
    next(task.process(rows[:8]))
    began, spent, made = time.monotonic(), cpu(), 0
    for at in range(0, calls, in_flight):
        made += sum(
            row["generation"] is not None for row in next(task.process(rows[at : at + in_flight]))
        )
    assert made == calls, made
    return time.monotonic() - began, cpu() - spent


def data_designer(base_url: str, calls: int, in_flight: int) -> tuple[float, float]:
    """One text column over a sampler column; its own dataset builder, writing Parquet."""
    import data_designer.config as dd
    from data_designer.interface import DataDesigner

    provider = dd.ModelProvider(name="fake", endpoint=base_url, api_key="EMPTY")
    parameters = dd.ChatCompletionInferenceParams(
        temperature=1.0, top_p=1.0, max_tokens=256, max_parallel_requests=in_flight
    )
    model = dd.ModelConfig(
        alias="fake", model="fake", provider="fake", inference_parameters=parameters,
        skip_health_check=True,
    )  # fmt: skip
    builder = dd.DataDesignerConfigBuilder(model_configs=[model])
    builder.add_column(
        dd.SamplerColumnConfig(name="number", sampler_type="uuid", params=dd.UUIDSamplerParams())
    )
    builder.add_column(
        dd.LLMTextColumnConfig(
            name="text", prompt=USER + "{{ number }}", system_prompt=SYSTEM, model_alias="fake"
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        designer = DataDesigner(artifact_path=folder, model_providers=[provider])
        spans = []
        for n in (in_flight, in_flight + calls):  # the difference is without set-up and profiling
            began, spent = time.monotonic(), cpu()
            made = designer.create(builder, num_records=n, dataset_name=f"n{n}")
            assert len(made.load_dataset()) == n
            spans.append((time.monotonic() - began, cpu() - spent))
    return spans[1][0] - spans[0][0], spans[1][1] - spans[0][1]


PEERS = {"distilabel": distilabel, "data-designer": data_designer}

if __name__ == "__main__":
    name, url, n_calls, n_in_flight = sys.argv[1:]
    seconds, used = PEERS[name](url, int(n_calls), int(n_in_flight))
    told = {"peer": f"{name} {version(name)}", "calls": int(n_calls), "seconds": seconds}
    print(json.dumps({**told, "cpu": used}))
