//go:build faultpoints

package clock

import (
	"os"
	"strings"
	"time"
)

// Variable names the file that holds by how much the computer's clock is wrong, as [time.ParseDuration] reads it. Whoever changes the
// file steps the clock while the program runs.
const Variable = "CLOCK_OFFSET_FILE"

// wall is what the clock of a computer shows that is wrong by so much. Nothing to read: it is right.
func wall() time.Time {
	now := time.Now().Round(0)
	written, err := os.ReadFile(os.Getenv(Variable))
	if err != nil {
		return now
	}
	offset, err := time.ParseDuration(strings.TrimSpace(string(written)))
	if err != nil {
		return now
	}
	return now.Add(offset)
}
