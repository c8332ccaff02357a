// Package e2e tests the bot as its users have it: as a process, against a real homeserver (Synapse), in rooms with real clients.
// Clients that must lie are those of package people; Element's own crypto, in package element, is the reference.
//
// The tests share one homeserver and one bot, each in rooms of its own; those that stop the bot, or need another configuration,
// have one for themselves. Nothing runs with -short.
package e2e

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"

	"sendertrust/e2e/botproc"
	"sendertrust/e2e/people"
	"sendertrust/e2e/synapse"
)

const (
	// patience is how long a test waits for one thing. It is far more than any answer takes, so that a busy machine fails nothing.
	patience = 60 * time.Second
	// keyWait is encryption.wait of all bots here: how long one waits for a key before it gives up.
	keyWait = 8 * time.Second
	// startPatience is how long the homeserver and the bot may take to build and to start.
	startPatience = 3 * time.Minute
	// parallelTests is more than there are processors: tests mostly wait.
	parallelTests = "6"
	// mark is part of every text that is sent here. It must not appear in a bot's log.
	mark = "what-people-say-is-nobody-else's-business"
	// password is every account's. It must not appear either.
	password = "correct horse battery staple"
)

func TestMain(m *testing.M) {
	flag.Parse()
	if set := flag.Lookup("test.parallel"); set != nil && set.Value.String() == set.DefValue {
		if err := flag.Set("test.parallel", parallelTests); err != nil {
			panic(err)
		}
	}
	stop, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	go func() {
		<-stop.Done()
		if !errors.Is(context.Cause(stop), errDone) {
			shared.close()
			os.Exit(1)
		}
	}()
	code := m.Run()
	if err := shared.checkLog(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	shared.close()
	cancel()
	os.Exit(code)
}
