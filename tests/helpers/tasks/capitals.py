"""A task of Inspect's that needs no network."""

from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import includes
from inspect_ai.solver import generate

CAPITALS = {"France": "Paris", "Japan": "Tokyo", "Italy": "Rome", "Spain": "Madrid", "Egypt": "Cairo", "Germany": "Berlin"}


@task
def capitals():
    """Six capitals, right where the answer names the city."""
    asked = [Sample(input=f"What is the capital of {land}?", target=city) for land, city in CAPITALS.items()]
    return Task(dataset=asked, solver=generate(max_tokens=16), scorer=includes())
