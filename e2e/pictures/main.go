// Command pictures takes the pictures of the documentation: the bot in a room, as a desktop client shows it. It starts a private
// homeserver, the bot, a few people, and the client nheko on a screen that nobody sees, lets them talk, and writes the pictures
// to docs/pictures. It ends by itself and leaves nothing running. make pictures calls it.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"sendertrust/e2e/botproc"
	"sendertrust/e2e/child"
)

const exitInterrupted = 130

func main() {
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx)
	interrupted := ctx.Err() != nil
	cancel()
	switch {
	case err == nil:
	case interrupted:
		fmt.Fprintln(os.Stderr, "Interrupted. Everything is stopped.")
		os.Exit(exitInterrupted)
	default:
		fmt.Fprintln(os.Stderr, "pictures:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) (err error) {
	root, err := botproc.ProjectRoot(ctx)
	if err != nil {
		return err
	}
	if _, err = child.Install(ctx, root, "desktop"); err != nil {
		return err
	}
	pictures := filepath.Join(root, "docs", "pictures")
	if err = os.MkdirAll(pictures, 0o755); err != nil {
		return err
	}
	scratch, err := os.MkdirTemp("", "sendertrust-pictures-")
	if err != nil {
		return err
	}
	all := &cast{pictures: pictures}
	defer func() { err = errors.Join(err, all.stop(), os.RemoveAll(scratch)) }()
	if err = all.start(ctx, root, scratch); err != nil {
		return err
	}
	if err = all.play(ctx); err != nil {
		return fmt.Errorf("%w\nThe bot's last words:\n%s\nThe client's:\n%s", err, all.bot.Tail(10), all.desktop.tail())
	}
	return nil
}
