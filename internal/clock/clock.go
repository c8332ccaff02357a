// Package clock gives the time by which the program waits.
package clock

import "time"

// Steady gives a clock that shows the computer's time when it was made, and from then on runs as evenly as time does: whoever sets the
// computer's clock, by hand or by a time server, makes nothing that waits wait an hour longer, and nothing give up an hour too early. It
// stands still while the computer sleeps. Times that it gave may be stored, and may be in the future for the next process.
func Steady() func() time.Time {
	start := wall()
	begun := time.Now() // it has the monotonic reading that counts
	return func() time.Time { return start.Add(time.Since(begun)) }
}
