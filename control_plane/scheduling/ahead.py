"""When a slot may be held for a request that is still to come.

Such a reservation is a bet on what one client does next. It spares that client a round trip, and must cost the others
next to nothing: so it is made where a slot is to spare, and where it is lost, it is lost for a moment only.
"""

from __future__ import annotations


def spares(slots: int, free: int, ahead: int, *, more: bool = False) -> bool:
    """Whether a server can hold one more slot ahead of need. `free`: slots before that; `ahead`: held so already;
    `more`: for somebody who has one already.

    At least half of the slots stay free: a server that takes that many more requests while the ticket lives would have
    to double its work within a second or two, so hardly anybody ever waits for a slot that is held for nobody. At most
    a quarter are held: so much is the most that clients can take away from others by asking and not coming. A server
    with less than four slots has none to spare. Who asks for more than one gets those only while less than half of
    that quarter is held, so that there is one for others too.
    """
    return 2 * (free - 1) >= slots and (8 if more else 4) * (ahead + 1) <= slots
