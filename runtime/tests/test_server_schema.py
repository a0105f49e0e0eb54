"""Requests that schemathesis makes from data/openapi.yaml, valid and invalid: each gets an answer that it allows.

TIUE_EXAMPLES=2000 tries more of them, and other ones each time.
"""

import os
from pathlib import Path

import pytest

pytest.importorskip("schemathesis")
pytest.importorskip("starlette")
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import positive_data_acceptance
from tiue_runtime.serve.app import create_app
from tiue_runtime.serve.server_settings import ServerSettings

FEW = 50
EXAMPLES = int(os.environ.get("TIUE_EXAMPLES", FEW))

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of unknown words and long prompts
server = None


async def application(scope, receive, send):
    """Pass a request on to the server. schemathesis wants an application before there are fixtures."""
    await server(scope, receive, send)


schema = schemathesis.openapi.from_path(Path(__file__).parent / "data/openapi.yaml")
schema.app = application


@pytest.fixture(autouse=True)
def serve(pipe):
    """Make the server that the schema describes. schemathesis ends its life after each test."""
    global server
    server = create_app({"tiny": pipe}, ServerSettings(hosts=("testserver",), most_pixels=10_000, most_pictures=2))


@schema.parametrize()
@settings(max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES == FEW, suppress_health_check=list(HealthCheck))
def test_every_answer_is_one_that_the_schema_allows(case):
    # The schema has 504 for a timeout, and no other error of the server. It cannot say which fields exclude each other,
    # so that the server may refuse what the schema allows.
    case.call_and_validate(excluded_checks=[not_a_server_error, positive_data_acceptance])
