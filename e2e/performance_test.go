package e2e

import (
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"maunium.net/go/mautrix/id"

	"sendertrust/e2e/botproc"
	"sendertrust/e2e/people"
)

const (
	performanceMessages = 200
	performanceSenders  = 5
	performanceRooms    = 3
	medianLimit         = time.Second
	// waysLimit is for a machine on which the homeserver alone takes that long: an answer is two events, of which each has to be sent, and to
	// come with a /sync.
	waysLimit   = 3
	memoryLimit = 80 << 20
)

// Five people talk at the same time in three rooms, each waiting for the answer to one message before the next. Not parallel: the
// machine is to do nothing else. It is shared, though: what is too slow is measured once more, and may take some times as long as a message
// takes to come back to its sender.
func TestTwoHundredMessagesAreAnsweredWithinASecondEach(t *testing.T) {
	w := theWorld(t)
	bot := w.newBot(t, nil)
	senders := make([]*people.Person, performanceSenders)
	for i := range senders {
		senders[i], _ = w.newStranger(t, fmt.Sprint("sender", i))
	}
	rooms := make([]id.RoomID, performanceRooms)
	for i := range rooms {
		rooms[i] = newRoom(t, true, bot, senders[0], senders...)
	}
	median, way := measure(t, bot, senders, rooms)
	if median >= medianLimit {
		median, way = measure(t, bot, senders, rooms)
	}
	if limit := max(medianLimit, waysLimit*way); median >= limit {
		t.Errorf("the median is %v, not under %v", median, limit)
	}
	if memory := must(bot.RSS())(t); memory >= memoryLimit {
		t.Errorf("the bot takes %d MiB, not under %d", memory>>20, memoryLimit>>20)
	}
	for _, room := range rooms {
		settle(t, senders[0], room)
	}
}

// measure has the messages sent and answered, prints how long that took, and gives the median, and that of how long a message took to come back
// to its sender.
func measure(t *testing.T, bot *botproc.Bot, senders []*people.Person, rooms []id.RoomID) (median, way time.Duration) {
	t.Helper()
	ctx := within(t, 5*patience)
	times, ways := make([][]time.Duration, performanceSenders), make([][]time.Duration, performanceSenders)
	var talking sync.WaitGroup
	begin := time.Now()
	for i, sender := range senders {
		talking.Go(func() {
			for n := range performanceMessages / performanceSenders {
				sent := time.Now()
				eventID, err := sender.Send(ctx, rooms[n%performanceRooms], say(fmt.Sprint("message ", n)))
				if err != nil {
					t.Error(err)
					return
				}
				if err = sender.WaitForEvent(ctx, eventID); err != nil {
					t.Error(err)
					return
				}
				ways[i] = append(ways[i], time.Since(sent))
				answer, err := sender.WaitForAnswer(ctx, eventID)
				if err != nil {
					t.Error(err)
					return
				}
				times[i] = append(times[i], time.Since(sent))
				if answer.Annotation.Code != "unverified_identity" {
					t.Errorf("%s was answered by %s", eventID, answer.Annotation.Code)
				}
			}
		})
	}
	talking.Wait()
	took := time.Since(begin)
	memory := must(bot.RSS())(t)
	all, back := slices.Sorted(slices.Values(slices.Concat(times...))), slices.Sorted(slices.Values(slices.Concat(ways...)))
	if len(all) != performanceMessages {
		t.Fatalf("%d of %d messages were answered", len(all), performanceMessages)
	}
	median, way = all[len(all)/2], back[len(back)/2]
	p99 := all[len(all)*99/100]
	t.Logf("%d messages by %d senders in %d rooms, answered in %v: from send to answer median %v, p99 %v, and back to their sender %v; resident memory %.1f MiB",
		len(all), performanceSenders, performanceRooms, took.Round(time.Millisecond), median.Round(time.Millisecond), p99.Round(time.Millisecond),
		way.Round(time.Millisecond), float64(memory)/(1<<20))
	return median, way
}
