package main

import (
	"cmp"
	"os"
	"slices"
	"strings"

	"github.com/google/pprof/profile"
)

// share is what a kind of work takes of the time.
type share struct {
	name    string
	percent float64
}

// kinds say what a function is about, by a part of its name. A sample belongs to the innermost function that is about something.
var kinds = []struct{ part, name string }{
	{"ed25519", "checking signatures"}, {"edwards25519", "checking signatures"},
	{"encoding/json", "JSON"}, {"tidwall/", "JSON"}, {"canonicaljson", "JSON"},
	{"go-sqlite3", "SQLite"},
	{"database/sql", "database/sql"}, {"dbutil", "database/sql"},
	{"goolm", "Olm and Megolm"}, {"crypto/", "Olm and Megolm"}, {"encoding/base64", "Olm and Megolm"},
	{"zerolog", "logging"},
	{"runtime.gcBgMarkWorker", "garbage collection"}, {"runtime.bgsweep", "garbage collection"}, {"runtime.bgscavenge", "garbage collection"},
}

const otherKind = "everything else"

// sharesOf sums a CPU profile up by kinds of work, the greatest first.
func sharesOf(file string) ([]share, error) {
	opened, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer opened.Close()
	read, err := profile.Parse(opened)
	if err != nil {
		return nil, err
	}
	time, total := make(map[string]float64), 0.0
	for _, sample := range read.Sample {
		value := float64(sample.Value[len(sample.Value)-1])
		time[kindOf(sample)] += value
		total += value
	}
	var shares []share
	for name, value := range time {
		shares = append(shares, share{name, 100 * value / total})
	}
	slices.SortFunc(shares, func(a, b share) int { return cmp.Compare(b.percent, a.percent) })
	return shares, nil
}

func kindOf(sample *profile.Sample) string {
	for _, location := range sample.Location {
		for _, line := range location.Line {
			if kind := kindOfFunction(line.Function.Name); kind != "" {
				return kind
			}
		}
	}
	return otherKind
}

func kindOfFunction(name string) string {
	for _, kind := range kinds {
		if strings.Contains(name, kind.part) {
			return kind.name
		}
	}
	return ""
}
