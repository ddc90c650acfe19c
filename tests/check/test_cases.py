from itertools import combinations, product

import torch

from flashlab.attention.backends import BACKENDS
from flashlab.check import cases, run
from flashlab.check.cases import Case, covering_cases, full_cases, make_inputs, parse, quick_cases

CPU = torch.device("cpu")


def test_a_case_is_its_name():
    assert all(parse(case.name) == case for case in full_cases())
    assert len(set(full_cases())) == len(full_cases())


def test_all_cases_are_possible_and_the_quick_ones_are_among_them():
    assert set(quick_cases()) <= set(full_cases())  # the full ones are filtered
    assert set(covering_cases()) <= set(full_cases())


def test_a_case_has_the_same_inputs_every_time_and_no_other_case_has_them():
    case = Case(lengths="37x37")
    first, second, other = (make_inputs(each, CPU) for each in (case, case, Case(lengths="37x37", mask="causal")))
    assert torch.equal(first.q, second.q)
    assert torch.equal(first.v, second.v)
    assert not torch.equal(first.q, other.q)


def test_every_pair_of_levels_is_covered():
    factors = {
        "dtype": cases.DTYPES,
        "head_dim": cases.HEAD_DIMS,
        "lengths": cases.LENGTHS,
        "mask": cases.MASKS,
        "heads": cases.HEADS,
        "feature": cases.FEATURES,
        "layout": cases.LAYOUTS,
    }
    covered = {
        frozenset(pair)
        for case in covering_cases()
        for pair in combinations([(factor, getattr(case, factor)) for factor in factors], 2)
    }
    for one, other in combinations(factors, 2):
        for a, b in product(factors[one], factors[other]):
            possible = cases._is_possible(Case(**{one: a, other: b}))
            assert (frozenset([(one, a), (other, b)]) in covered) == possible


def test_every_backend_is_judged_by_every_feature():
    tasks = run.plan([*BACKENDS, "auto"], [], CPU, full=True)
    for backend in [*BACKENDS, "auto"]:
        judged = [task.case for task in tasks if backend in task.backends]
        assert {case.head_dim for case in judged} == set(cases.HEAD_DIMS)
        assert {case.mask for case in judged} == set(cases.MASKS)
        assert {case.layout for case in judged} == set(cases.LAYOUTS)
        assert {case.feature for case in judged} == set(cases.FEATURES)
