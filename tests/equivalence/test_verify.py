"""The proof that every strategy gives the losses of one process: the matrix of `manyrank verify`, case by case."""

import math

import pytest
import warm
from launches import nightly

from manyrank.project_files import asset
from manyrank.tools import verify
from manyrank.topology.strategies import STRATEGIES

CASES = list(verify.cases(verify.METHODS, verify.COMPARED, verify.LAUNCHERS, 2))


def is_nightly(case: verify.Case) -> bool:
    """A method on a strategy has one launcher by day and the other at night; each of them meets both by day."""
    if case.via == "python":
        return False
    turn = verify.METHODS.index(case.method) + verify.COMPARED.index(case.strategy.name)
    return case.via != verify.LAUNCHERS[turn % 2]


@pytest.fixture(scope="module")
def outcomes(embedded_model, tmp_path_factory):
    """Each case is launched when a test first asks for it."""
    folder, done = tmp_path_factory.mktemp("verify"), {}

    def outcome(case: verify.Case) -> verify.Outcome:
        if case not in done:
            recipe = str(asset("launch", "recipes", "verify.yaml"))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(verify.subprocess, "run", warm.run)
                done[case] = verify.run(case, recipe, folder, steps=3)
        return done[case]

    return outcome


@pytest.mark.parametrize(
    "case", [case for given in CASES for case in (nightly(given) if is_nightly(given) else [given])], ids=str
)
def test_same_losses_as_one_process(case, outcomes):
    outcome, single = outcomes(case), outcomes(verify.Case(STRATEGIES["single"], case.method, "python", 1))
    assert verify.problems(case, outcome, single) == []
    assert len(outcome.losses) == 3 and outcome.losses[2] < outcome.losses[0]
    if "parameters" in case.strategy.shards:
        assert verify.share(outcome.facts) <= 0.525
    else:
        assert verify.share(outcome.facts) == 1
    if case.strategy.replicas:
        assert (outcome.facts["world_size"], outcome.facts["mesh"]) == (4, [2, 2])


def test_hsdp_has_two_copies_of_the_model_on_one_machine():
    hsdp = STRATEGIES["hsdp"]
    made = [verify.Case(hsdp, "lora", "torchrun", verify.processes(hsdp, nproc)) for nproc in (2, 3, 4, 7, 8)]
    sizes = [(case.nproc, case.mesh) for case in made]
    assert sizes == [(4, [2, 2]), (4, [2, 2]), (4, [2, 2]), (6, [2, 3]), (8, [2, 4])]


def test_hsdp_is_left_out_where_there_are_too_few_gpus():
    assert verify.fitting(2, 0) == verify.fitting(2, 4) == tuple(verify.COMPARED)
    assert verify.fitting(2, 2) == ("ddp", "zero2", "fsdp", "zero3")


GOOD = verify.Outcome(
    (2.0, 1.5),
    (1.0, 0.9),
    {
        "wrapper": "DeepSpeedEngine",
        "distributed_type": "DEEPSPEED",
        "world_size": 2,
        "precision": "no",
        "base_bytes": 100,
        "base_bytes_here": [50, 50],
        "trainable_tensors": 4,
        "mesh": [],
    },
    4,
)
ZERO3 = verify.Case(STRATEGIES["zero3"], "lora", "torchrun", 2)


def wrong(**changes) -> list[str]:
    facts = GOOD.facts | {key: value for key, value in changes.items() if key in GOOD.facts}
    plain = {key: value for key, value in changes.items() if key not in GOOD.facts}
    outcome = verify.Outcome(**{**vars(GOOD), "facts": facts, **plain})
    return verify.problems(ZERO3, outcome, GOOD)


def test_each_deviation_is_found():
    assert wrong() == []
    assert wrong(wrapper="DistributedDataParallel") == ["wrapped as DistributedDataParallel"]
    assert wrong(distributed_type="MULTI_CPU") == ["started as MULTI_CPU"]
    assert wrong(world_size=1) == ["1 processes"]
    assert wrong(base_bytes_here=[100, 100]) == ["a rank holds 100% of the base"]
    assert wrong(mesh=[2, 2]) == ["parameters on a mesh of [2, 2]"]
    assert wrong(saved_tensors=0) == ["saved 0 of 4 tensors"]
    assert wrong(losses=(2.0, 1.5001))[0].startswith("loss differs by 6.7e-05")
    assert wrong(losses=(2.0, math.nan))[0].startswith("loss differs")
    assert wrong(grad_norms=(1.0,))[0].startswith("grad norm differs by inf")
    assert wrong(error="exit code 1: boom") == ["exit code 1: boom"]


def test_wrong_case_gives_exit_code_1(monkeypatch, capsys):
    outcome = verify.Outcome((), (), {}, 0, error="exit code 1: boom")
    monkeypatch.setattr(verify, "run", lambda *args, **kwargs: outcome)
    assert verify.main(["--methods", "lora", "--strategies", "ddp", "--via", "torchrun"]) == 1
    assert "2 cases are wrong" in capsys.readouterr().out
