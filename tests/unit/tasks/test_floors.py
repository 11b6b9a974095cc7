"""Up to where a lane is taken: a hint that does not hold for long."""

from __future__ import annotations

from control_plane.tasks.lane_rows import Floors
from control_plane.tasks.model import LaneId

A, B = LaneId(1), LaneId(2)


def test_it_holds_for_a_second_after_a_look_from_the_beginning() -> None:
    floors = Floors()
    assert floors.get(A, 10.0) == ""
    floors.put(A, "", "05", 10.0)
    assert (floors.get(A, 10.9), floors.get(B, 10.9)) == ("05", "")
    floors.put(A, "05", "09", 10.9)  # a claim behind the floor saw nothing before it
    assert (floors.get(A, 10.95), floors.get(A, 11.0)) == ("09", "")
    floors.put(A, "", "11", 11.0)
    assert floors.get(A, 11.9) == "11"


def test_what_comes_back_drops_it() -> None:
    floors = Floors()
    floors.put(A, "", "05", 10.0)
    floors.put(B, "", "06", 10.0)
    floors.drop([A])
    assert (floors.get(A, 10.1), floors.get(B, 10.1)) == ("", "06")
    floors.put(A, "05", "07", 10.1)  # a claim that began before: for a second at most
    assert (floors.get(A, 11.0), floors.get(A, 11.1)) == ("07", "")
