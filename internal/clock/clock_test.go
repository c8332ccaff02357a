package clock

import (
	"testing"
	"testing/synctest"
	"time"
)

func TestSteadyClockRunsAsTimeDoes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		steady, begun := Steady(), time.Now()
		time.Sleep(90 * time.Minute)
		if gone := steady().Sub(begun.Round(0)); gone != 90*time.Minute {
			t.Errorf("%v have gone by", gone)
		}
	})
}
