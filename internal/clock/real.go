//go:build !faultpoints

package clock

import "time"

// wall is what the computer's clock shows.
func wall() time.Time { return time.Now().Round(0) }
