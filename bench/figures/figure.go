// Package figures is what the benchmarks measure, and what is made of it: medians, ratios, the table, and the check that nothing became
// slower.
package figures

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
)

// Figure is one measurement of one process. Both sides print them, one JSON object in a line.
type Figure struct {
	// Side is whose code was measured: hook, stock or reference.
	Side string `json:"side"`
	// Store is where the keys were kept: memory, sqlite-full, sqlite-normal or postgres.
	Store string `json:"store"`
	// Work is what was measured; Stored is how many sessions were in the database before, where that matters.
	Work   string `json:"work"`
	Stored int    `json:"stored,omitempty"`
	// Count is how many times the work was done, MicrosEach how long each took by the wall's clock, CPUMicrosEach by the processors'.
	Count         int     `json:"count,omitempty"`
	MicrosEach    float64 `json:"us_each,omitempty"`
	CPUMicrosEach float64 `json:"cpu_us_each,omitempty"`
	// PeakKiB is the most memory that was resident during the work, ResidentKiB what still was after it, and LiveKiB what the program had
	// allocated then and not freed.
	PeakKiB     int `json:"peak_kib,omitempty"`
	ResidentKiB int `json:"resident_kib,omitempty"`
	LiveKiB     int `json:"live_kib,omitempty"`
	// Values are other results by their names, with the unit in the name.
	Values map[string]float64 `json:"values,omitempty"`
}

// Read reads the figures that a process has printed.
func Read(from io.Reader) (read []Figure, err error) {
	lines := bufio.NewScanner(from)
	for lines.Scan() {
		var figure Figure
		if err = json.Unmarshal(lines.Bytes(), &figure); err != nil {
			return nil, fmt.Errorf("failed to read the figure %q: %w", lines.Text(), err)
		}
		read = append(read, figure)
	}
	return read, lines.Err()
}
