"""Fields and masks whose files are damaged."""

import random

from odd_files import DAMAGE, sound

from sslcells.data._decode import Unreadable
from sslcells.data._fields import Field, How, read_field, read_mask


def test_damaged_fields_and_masks_are_named(tmp_path):
    """Whatever is wrong with a file, reading it says so, or gives numbers of the shape that it names."""
    draw = random.Random(0)
    for turn in range(60):
        name, data = draw.choice(sorted(sound().items()))
        file = tmp_path / f"{turn}{name}"
        file.write_bytes(draw.choice(DAMAGE)(data, draw))
        for read in (read_field, read_mask):
            found = reason = None
            try:
                found = read(str(file), How())
            except Unreadable as error:
                reason = str(error)
            if reason is not None:
                assert 3 < len(reason) < 500, name
                continue
            values = found.values if isinstance(found, Field) else found
            assert 0 < values.size < 2**20, name
