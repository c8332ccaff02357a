// Package soak has everything go wrong that can, for long and at once, and counts what comes of it: whether each message was answered
// once and rightly. `make soak` runs it in full, and `make test` a short form of each part.
//
// Each part is a test (or several) that plays its scenes with a bot as a process, on a real homeserver, and adds a line to the table
// that is printed at the end. A part fails when something is not as promised in docs/reliability.md.
package soak

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"testing"
)

var (
	full    = flag.Bool("full", false, "the whole soak, not its short form")
	without = flag.String("without", "", "take a protection away (gate, barrier, token, inbox), to see the kills notice")
)

// parallelTests is more than there are processors: tests mostly wait.
const parallelTests = "12"

// often gives a number by whether the soak runs in full.
func often(short, long int) int {
	if *full {
		return long
	}
	return short
}

var results table

func TestMain(m *testing.M) {
	flag.Parse()
	if set := flag.Lookup("test.parallel"); set != nil && set.Value.String() == set.DefValue {
		if err := flag.Set("test.parallel", parallelTests); err != nil {
			panic(err)
		}
	}
	interrupted := make(chan os.Signal, 1)
	signal.Notify(interrupted, os.Interrupt, syscall.SIGTERM)
	go func() {
		<-interrupted
		shared.close()
		os.Exit(1)
	}()
	code := m.Run()
	results.print(os.Stdout)
	// Whatever went wrong, nothing of it may have brought a secret into a log.
	if err := errors.Join(shared.checkLogs(), shared.close()); err != nil {
		fmt.Fprintln(os.Stderr, "FAIL:", err)
		code = 1
	}
	os.Exit(code)
}
