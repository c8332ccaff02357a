package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"image"
	"image/png"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

const (
	// look is how often we look at what is shown while we wait.
	look = 250 * time.Millisecond
	// patience is how long something may take to be shown.
	patience = 30 * time.Second
	// blinking is how many pixels a cursor that blinks makes: a screen on which no more change stands still.
	blinking = 100
	// wheelTurns is more than any room here is high.
	wheelTurns = "30"
	// overMessages is where messages are, from the left, also beside a dialog.
	overMessages = 300
	// colours are enough for text, icons and emojis.
	colours = 96
)

// The roles of elements that are clicked, by their names in AT-SPI.
const (
	label  = "label"
	button = "push button"
	field  = "text"
)

// element is something that is shown, with its place on the screen in pixels.
type element struct {
	Role, Name          string
	X, Y, Width, Height int
}

// elements gives all that is shown.
func (d *desktop) elements(ctx context.Context) (shown []element, err error) {
	output, err := d.run(ctx, "/usr/bin/python3", "-c", elementsScript)
	if err == nil {
		err = json.Unmarshal(output, &shown)
	}
	if err != nil {
		return nil, fmt.Errorf("failed to see what is shown: %w", err)
	}
	return shown, nil
}

// await looks again and again until the screen is as wanted.
func (d *desktop) await(ctx context.Context, what string, wanted func(shown []element) bool) error {
	ctx, cancel := context.WithTimeoutCause(ctx, patience, errors.New("it took too long"))
	defer cancel()
	ticker := time.NewTicker(look)
	defer ticker.Stop()
	var shown []element
	for {
		now, err := d.elements(ctx)
		if err == nil {
			shown = now
			if wanted(shown) {
				return nil
			}
		}
		if err = d.check(); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s was not shown: %w; what is shown: %s", what, context.Cause(ctx), names(shown))
		case <-ticker.C:
		}
	}
}

// names lists what is shown, for errors.
func names(shown []element) string {
	var all []string
	for _, element := range shown {
		if element.Name != "" {
			all = append(all, strconv.Quote(element.Name))
		}
	}
	return strings.Join(all, ", ")
}

// find waits until an element is shown and does not move any more, and gives it; of several, the first: that in the list of rooms
// before those in the room.
func (d *desktop) find(ctx context.Context, role, name string) (found element, err error) {
	return d.findWhere(ctx, role, name, func(element) bool { return true })
}

// findWhere is find for elements that are elsewhere, too.
func (d *desktop) findWhere(ctx context.Context, role, name string, wanted func(element) bool) (found element, err error) {
	err = d.await(ctx, fmt.Sprintf("the %s %q", role, name), func(shown []element) bool {
		for _, element := range shown {
			if element.Role == role && element.Name == name && wanted(element) {
				still := found == element
				found = element
				return still
			}
		}
		found = element{}
		return false
	})
	return found, err
}

// open shows a room; a click on the room that is shown already would close it.
func (d *desktop) open(ctx context.Context, name string) error {
	if d.room != name {
		if err := d.click(ctx, label, name); err != nil {
			return err
		}
		d.room = name
	}
	return nil
}

// scrollDown goes to the newest message of the room. The client comes by there from above, for it lays messages that it has not shown yet
// over each other.
func (d *desktop) scrollDown(ctx context.Context) error {
	for _, wheel := range []string{"4", "5"} {
		if err := d.still(ctx); err != nil {
			return err
		}
		y := strconv.Itoa(d.height / 2)
		if _, err := d.run(ctx, "xdotool", "mousemove", strconv.Itoa(overMessages), y, "click", "--repeat", wheelTurns, "--delay", "20", wheel); err != nil {
			return err
		}
	}
	return d.still(ctx)
}

// see waits until an element whose name contains the words is shown.
func (d *desktop) see(ctx context.Context, words string) error {
	return d.await(ctx, strconv.Quote(words), func(shown []element) bool {
		return slices.ContainsFunc(shown, func(element element) bool { return strings.Contains(element.Name, words) })
	})
}

// click waits for an element and clicks into its middle.
func (d *desktop) click(ctx context.Context, role, name string) error {
	target, err := d.find(ctx, role, name)
	if err != nil {
		return err
	}
	return d.clickOn(ctx, target)
}

func (d *desktop) clickOn(ctx context.Context, target element) error {
	x, y := target.X+target.Width/2, target.Y+target.Height/2
	_, err := d.run(ctx, "xdotool", "mousemove", strconv.Itoa(x), strconv.Itoa(y), "click", "1")
	return err
}

// say types a line into the field for messages, and sends it.
func (d *desktop) say(ctx context.Context, text string) error {
	if err := d.click(ctx, field, ""); err != nil {
		return err
	}
	if _, err := d.run(ctx, "xdotool", "type", "--delay", "20", text); err != nil {
		return err
	}
	if _, err := d.find(ctx, field, text); err != nil {
		return err
	}
	_, err := d.run(ctx, "xdotool", "key", "Return")
	return err
}

// still waits until the screen stands still.
func (d *desktop) still(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, patience, errors.New("the screen does not stand still"))
	defer cancel()
	ticker := time.NewTicker(look)
	defer ticker.Stop()
	var before image.Image
	for same := 0; same < 3; {
		now, err := d.look(ctx)
		if err != nil {
			return err
		}
		if same++; before == nil || difference(before, now) > blinking {
			same = 0
		}
		before = now
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-ticker.C:
		}
	}
	return nil
}

// resize gives the client's window another height.
func (d *desktop) resize(ctx context.Context, height int) error {
	d.height = height
	_, err := d.run(ctx, "xdotool", "windowsize", "--sync", d.window, strconv.Itoa(width), strconv.Itoa(height))
	return err
}

// look gives what the screen shows now.
func (d *desktop) look(ctx context.Context) (image.Image, error) {
	output, err := d.run(ctx, "import", "-window", "root", "png:-")
	if err != nil {
		return nil, err
	}
	return png.Decode(bytes.NewReader(output))
}

// difference counts the pixels in which two pictures of the same size differ.
func difference(one, other image.Image) (count int) {
	bounds := one.Bounds()
	for y := bounds.Min.Y; y < bounds.Max.Y; y++ {
		for x := bounds.Min.X; x < bounds.Max.X; x++ {
			if one.At(x, y) != other.At(x, y) {
				count++
			}
		}
	}
	return count
}

// shoot takes a picture of the client's window with the newest messages, in few colours so that the file is small.
func (d *desktop) shoot(ctx context.Context, path string) error {
	if err := d.scrollDown(ctx); err != nil {
		return err
	}
	// Nothing is under the mouse there that would say so.
	if _, err := d.run(ctx, "xdotool", "mousemove", strconv.Itoa(width/2), "2"); err != nil {
		return err
	}
	if err := d.still(ctx); err != nil {
		return err
	}
	path, err := filepath.Abs(path)
	if err != nil {
		return err
	}
	_, err = d.run(ctx, "import", "-window", "root", "-crop", fmt.Sprintf("%dx%d+0+0", width, d.height), "+repage",
		"+dither", "-colors", strconv.Itoa(colours), "-strip", "-define", "png:compression-level=9", "png8:"+path)
	return err
}
