"""Prints what the windows on the screen show, as a JSON list: role, name and place of each element, as the desktop's interface for
screen readers (AT-SPI) has them. An element that vanishes while it is read is left out."""

import json

import gi
import pyatspi

DEEPEST = 60


def name(accessible):
    """The element's name, or else its text: what is in an input field, or in a message, is no name."""
    if accessible.name:
        return accessible.name
    try:
        return accessible.queryText().getText(0, -1)
    except NotImplementedError:
        return ""


def shown(accessible, depth=0):
    if accessible is None or depth > DEEPEST:
        return
    try:
        if accessible.getState().contains(pyatspi.STATE_SHOWING):
            place = accessible.queryComponent().getExtents(pyatspi.DESKTOP_COORDS)
            yield {
                "role": accessible.getRoleName(), "name": name(accessible),
                "x": place.x, "y": place.y, "width": place.width, "height": place.height,
            }
    except (NotImplementedError, gi.repository.GLib.Error):
        pass
    try:
        children = list(accessible)
    except gi.repository.GLib.Error:
        return
    for child in children:
        yield from shown(child, depth + 1)


print(json.dumps([element for program in pyatspi.Registry.getDesktop(0) for element in shown(program)]))
