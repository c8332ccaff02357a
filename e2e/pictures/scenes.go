package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"sendertrust/e2e/people"
)

// play has everybody do what the pictures show.
func (c *cast) play(ctx context.Context) error {
	return inOrder(
		func() error { return c.conversation(ctx) },
		func() error { return c.verification(ctx) },
		func() error { return c.status(ctx) },
	)
}

// take takes a picture.
func (c *cast) take(ctx context.Context, name string) error {
	fmt.Println("Taking", name, "…")
	return c.desktop.shoot(ctx, filepath.Join(c.pictures, name))
}

// conversation shows what the bot says of a person whose key is pinned, of one whom nobody has verified, and of a device that nobody
// has confirmed.
func (c *cast) conversation(ctx context.Context) (err error) {
	if err = c.talk(ctx, c.bob, "We have the house! The deposit goes to the account in the contract."); err != nil {
		return err
	}
	if err = c.talk(ctx, c.carol, "Congratulations! I can help with the move on Saturday."); err != nil {
		return err
	}
	if c.thief, err = people.Login(ctx, c.server.URL, "bob", password, people.Options{DeviceName: "Web browser"}); err != nil {
		return err
	}
	if err = c.thief.WaitJoined(ctx, c.room, c.bot.UserID); err != nil {
		return err
	}
	if err = c.talk(ctx, c.thief, "Change of plan: please send the deposit to this new account instead."); err != nil {
		return err
	}
	if err = c.desktop.open(ctx, roomName); err != nil {
		return err
	}
	err = c.desktop.await(ctx, "the third answer", func(shown []element) bool {
		answers := 0
		for _, element := range shown {
			if isAuthor(element, botName) {
				answers++
			}
		}
		return answers >= 3
	})
	if err != nil {
		return err
	}
	return c.take(ctx, "room.png")
}

// isAuthor says whether an element is a name above a message, and not in the list of rooms or above the room.
func isAuthor(element element, name string) bool {
	const listWidth, topHeight = 220, 56
	return element.Role == label && element.Name == name && element.X > listWidth && element.Y > topHeight
}

// How high the window has to be for all that the bot says of itself, and for its emojis to be under those of the client.
const (
	statusHeight = 1030
	emojisHeight = 750
)

// verification shows how Alice verifies the bot, by emojis. She calls Bob, who runs it, and he confirms that he has heard what it shows.
func (c *cast) verification(ctx context.Context) error {
	shown := c.desktop
	return inOrder(
		func() error { return c.openProfile(ctx) },
		func() error { return c.take(ctx, "verify-1.png") },
		func() error { return shown.click(ctx, button, "Verify") },
		func() error { return shown.see(ctx, start) },
		// The profile is still there, under the dialog, and would hide the messages.
		func() error { return shown.click(ctx, button, "OK") },
		func() error { return shown.open(ctx, botName) },
		func() error { return shown.resize(ctx, emojisHeight) },
		func() error { return shown.click(ctx, button, start) },
		func() error { return shown.see(ctx, match) },
		func() error { return c.hear(ctx, "show these emojis?") },
		func() error { return c.take(ctx, "verify-2.png") },
		func() error { return shown.click(ctx, button, match) },
		func() error { return shown.see(ctx, "Waiting for other side to complete") },
		func() error {
			_, err := c.bob.Send(ctx, c.room, "!trust confirm "+c.code())
			return err
		},
		func() error { return shown.see(ctx, "Verification successful!") },
		func() error { return c.bot.WaitForLog(ctx, "A person was verified") },
		func() error { return shown.resize(ctx, usualHeight) },
		func() error { return c.take(ctx, "verify-3.png") },
		func() error { return shown.click(ctx, button, "Close") },
		func() error { return c.openProfile(ctx) },
		func() error { return c.take(ctx, "verify-4.png") },
		func() error { return shown.click(ctx, button, "OK") },
	)
}

// inOrder takes the steps until one fails.
func inOrder(steps ...func() error) error {
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// The buttons that start a verification, and that say that the emojis are the same.
const (
	start = "Start verification"
	match = "They match!"
)

// status shows what the bot says of itself.
func (c *cast) status(ctx context.Context) error {
	return inOrder(
		func() error { return c.desktop.say(ctx, "!trust status") },
		func() error { return c.desktop.see(ctx, "sent an image") },
		func() error { return c.desktop.resize(ctx, statusHeight) },
		func() error { return c.take(ctx, "status.png") },
	)
}

// openProfile shows the bot's profile: a click on its name above a message does.
func (c *cast) openProfile(ctx context.Context) error {
	author, err := c.desktop.findWhere(ctx, label, botName, func(element element) bool { return isAuthor(element, botName) })
	if err != nil {
		return err
	}
	return c.desktop.clickOn(ctx, author)
}

// talk lets a person say something, and waits for the bot's answer.
func (c *cast) talk(ctx context.Context, speaker *people.Person, text string) error {
	ctx, cancel := context.WithTimeoutCause(ctx, patience, errors.New("the bot did not answer"))
	defer cancel()
	eventID, err := speaker.Send(ctx, c.room, text)
	if err != nil {
		return err
	}
	_, err = speaker.WaitForAnswer(ctx, eventID)
	return err
}

// code is what confirms the verification: Bob has heard it.
func (c *cast) code() string {
	for _, notice := range c.bob.Notices(c.room) {
		if _, after, found := strings.Cut(notice.Body, "!trust confirm "); found {
			code, _, _ := strings.Cut(after, " ")
			return code
		}
	}
	return ""
}

// hear waits until the bot has told Bob something about the verification. It has told Alice before.
func (c *cast) hear(ctx context.Context, words string) error {
	ctx, cancel := context.WithTimeoutCause(ctx, patience, errors.New("it took too long"))
	defer cancel()
	return c.bob.WaitForNotices(ctx, c.room, func(notices []people.Notice) bool {
		return slices.ContainsFunc(notices, func(notice people.Notice) bool { return strings.Contains(notice.Body, words) })
	})
}
