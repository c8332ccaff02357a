package works

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http/httptest"
	"slices"
	"time"

	"maunium.net/go/mautrix/id"

	"sendertrust/bench/figures"
	"sendertrust/bench/inputs"
)

const (
	talkers = 10
	rooms   = 5
	// perSecond and talkFor are the conversation whose answers are timed, flood is how many messages come at once after it.
	perSecond = 50
	talkFor   = 20 * time.Second
	flood     = 2000
	patience  = 2 * time.Minute
)

// NewBot makes a bot that has no database yet, for a homeserver's address. What it writes goes into a directory.
type NewBot func(homeserver, dir string) interface {
	Run(ctx context.Context) error
}

// talk is a session of a talker in a room.
type talk struct {
	*inputs.Session
	room id.RoomID
}

// answers has a whole bot answer, over HTTP on the loopback, at a homeserver that does nothing else.
func (b *bench) answers() {
	if b.NewBot == nil {
		panic(errors.New("this program has no bot: bench/answers is the one that has"))
	}
	people := inputs.NewPeople(talkers, 1)
	b.account = inputs.NewPerson(inputs.Receiver, 0)
	b.server = inputs.NewServer(b.account, people...)
	b.server.NoIdentity()
	answered := make(chan inputs.Answered, flood)
	homeserver := inputs.NewHomeserver(b.server, func(a inputs.Answered) { answered <- a })
	listener := httptest.NewServer(homeserver)
	defer listener.Close()
	ctx, stop := context.WithCancel(b.ctx)
	ended := make(chan error, 1)
	go func() { ended <- b.NewBot(listener.URL, b.Dir).Run(ctx) }()

	talks := b.introduce(homeserver, people)
	await(answered, len(talks))
	b.report(b.converse(homeserver, talks, answered))
	b.report(b.flood(homeserver, talks, answered))
	stop()
	inputs.Check(<-ended)
}

// introduce has everybody meet the bot, share a session with it in each of two rooms, and say something there.
func (b *bench) introduce(homeserver *inputs.Homeserver, people []*inputs.Person) (talks []*talk) {
	own := homeserver.AwaitDevice(b.ctx)
	for i := range rooms {
		homeserver.BringRoom(roomNumber(i), people...)
	}
	for i, p := range people {
		device := p.Devices[0]
		device.Meet(own, b.server.Claim())
		for _, room := range []id.RoomID{roomNumber(i), roomNumber(i + 1)} {
			session := device.NewSession(room)
			homeserver.BringToDevice(device.ShareKey(own, session))
			talks = append(talks, &talk{session, room})
		}
	}
	for _, t := range talks {
		homeserver.Bring(t.room, t.Message())
	}
	return talks
}

func roomNumber(i int) id.RoomID { return id.RoomID(fmt.Sprintf("!talk%d:bench", i%rooms)) }

// converse times the answers to messages that come one after the other.
func (b *bench) converse(homeserver *inputs.Homeserver, talks []*talk, answered chan inputs.Answered) figures.Figure {
	messages := messagesIn(talks, int(talkFor.Seconds())*perSecond)
	var took []time.Duration
	figure := b.measure("answers_50", len(messages), func() {
		go func() {
			ticker := time.NewTicker(time.Second / perSecond)
			defer ticker.Stop()
			for i, message := range messages {
				<-ticker.C
				homeserver.Bring(talks[i%len(talks)].room, message)
			}
		}()
		took = await(answered, len(messages))
	})
	figure.MicrosEach = 0
	figure.Values = map[string]float64{"p50_us": percentile(took, 50), "p99_us": percentile(took, 99)}
	return figure
}

// flood counts the answers to messages that are all there at once.
func (b *bench) flood(homeserver *inputs.Homeserver, talks []*talk, answered chan inputs.Answered) figures.Figure {
	messages := messagesIn(talks, flood)
	figure := b.measure("answers_most", len(messages), func() {
		for i, message := range messages {
			homeserver.Bring(talks[i%len(talks)].room, message)
		}
		await(answered, len(messages))
	})
	figure.Values = map[string]float64{"answers_per_s": 1e6 / figure.MicrosEach}
	return figure
}

func messagesIn(talks []*talk, count int) []json.RawMessage {
	messages := make([]json.RawMessage, count)
	for i := range messages {
		messages[i] = talks[i%len(talks)].Message()
	}
	return messages
}

// await waits for so many answers, and gives how long each took.
func await(answered chan inputs.Answered, count int) []time.Duration {
	took := make([]time.Duration, 0, count)
	timeout := time.After(patience)
	for len(took) < count {
		select {
		case a := <-answered:
			took = append(took, a.Took)
		case <-timeout:
			panic(fmt.Errorf("%d of %d messages were answered within %s", len(took), count, patience))
		}
	}
	return took
}

// percentile is in microseconds.
func percentile(took []time.Duration, percent int) float64 {
	sorted := slices.SortedFunc(slices.Values(took), cmp.Compare[time.Duration])
	return float64(sorted[min(len(sorted)*percent/100, len(sorted)-1)].Nanoseconds()) / 1000
}
