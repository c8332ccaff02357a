package works

import (
	"context"
	"encoding/json"
	"flag"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"sendertrust/bench/receiver"
)

// Main does one work in this process, by the arguments of its command line, and prints its figures.
func Main(ctx context.Context, arguments []string, newBot NewBot) error {
	flags := flag.NewFlagSet("bench one", flag.ContinueOnError)
	o := Options{NewBot: newBot}
	work := flags.String("work", "keys-1", "what to measure: "+strings.Join(slices.Sorted(maps.Keys(works)), ", "))
	flags.StringVar((*string)(&o.Side), "side", string(receiver.Hook), "hook or stock")
	flags.StringVar((*string)(&o.Store), "store", string(receiver.SQLiteFull), "sqlite-full, sqlite-normal or postgres")
	flags.StringVar(&o.At, "at", "", "for postgres: the URI of an empty database")
	flags.StringVar(&o.Profiles, "profiles", "", "directory for profiles, one of each figure")
	flags.IntVar(&o.Keys, "keys", 2000, "how many room keys to receive")
	flags.IntVar(&o.Batch, "batch", 100, "how many of them in one /sync")
	flags.IntVar(&o.Stored, "stored", 0, "how many sessions are there before")
	if err := flags.Parse(arguments); err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "sendertrust-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	o.Dir = dir
	if o.Store != receiver.Postgres {
		o.At = filepath.Join(dir, "bench.db")
	}
	measured, err := Run(ctx, *work, o)
	if err != nil {
		return err
	}
	output := json.NewEncoder(os.Stdout)
	for _, figure := range measured {
		if err = output.Encode(figure); err != nil {
			return err
		}
	}
	return nil
}
