"""Pictures are blamed for deaths that they cause alone, and never for those of the pictures beside them."""

from gdino_hf.labeling.death_blame import Blame


def labelled(pictures, deadly, at_work):
    """Try a shard until no process dies; the number of deaths, and the places that are left out."""
    blame, deaths = Blame(pictures), 0
    while alive := deadly - blame.left_out:
        # Processes die of the first deadly picture, with all those at work that they read beside it.
        first = min(alive)
        deaths += 1
        for place in blame.shard_died({place for place in range(pictures) if abs(place - first) <= at_work}):
            deaths += place in deadly
            blame.looked_at(place, place in deadly)
        assert deaths < 100
    return deaths, blame.left_out


def test_a_deadly_picture_is_left_out_and_those_at_work_beside_it_are_not():
    assert labelled(10, {4}, at_work=3) == (4, {4})


def test_several_deadly_pictures_are_all_found():
    assert labelled(20, {1, 3, 12, 19}, at_work=2) == (3 + 2 + 3 + 2, {1, 3, 12, 19})


def test_all_pictures_are_looked_at_alone_if_no_process_tells_what_it_was_at():
    blame = Blame(3)
    assert [blame.shard_died(()), blame.shard_died({1}), blame.shard_died({2})] == [[], [], [0, 1, 2]]
    assert [blame.looked_at(0, False), blame.looked_at(1, True), blame.looked_at(2, False)] == [False, False, True]
    assert blame.left_out == {1}


def test_a_shard_that_processes_die_of_but_of_no_picture_alone_is_given_up_in_the_end():
    blame, rounds = Blame(4), []
    while blame.left_out != {0, 1, 2, 3}:
        alone = blame.shard_died({2, 3})
        rounds += [alone] if alone else []
        assert [blame.looked_at(place, False) for place in alone] == [False] * (len(alone) - 1) + [True] * bool(alone)
    assert rounds == [[2, 3], [0, 1, 2, 3]]
