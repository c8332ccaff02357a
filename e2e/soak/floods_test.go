package soak

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"maunium.net/go/mautrix/crypto"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"

	"sendertrust/e2e/botproc"
	"sendertrust/e2e/people"
)

const (
	// memoryLimit is the most memory that the bot may take, whatever floods it.
	memoryLimit = 200 << 20
	// answeredWithin is how soon an honest member is answered during a flood, 99 times of 100. The short form shares its machine with
	// whatever else is tested there.
	answeredWithin      = 2 * time.Second
	answeredWithinShort = 5 * time.Second
	// talkEvery is how often each of the honest members says something. That is below the limit of what the bot answers.
	talkEvery = 1200 * time.Millisecond
	// honestMembers talk, all in the room that is flooded.
	honestMembers = 4
	// floodKeyWait is how long events wait for their keys here, so that those of one flood are done with when the next one begins.
	floodKeyWait = 5 * time.Second
	// waveEvery is how often the flood comes.
	waveEvery = 400 * time.Millisecond
)

// flood is one of those that the bot has to bear.
type flood struct {
	name string
	// tries is how much of it comes.
	tries int
	// waves makes it.
	waves func(s *floodScene, tries int) []wave
	// arrived says that the bot has taken it all in.
	arrived func(s *floodScene, tries int, before, now map[string]float64) bool
	check   func(s *floodScene)
}

// floodScene is a bot, a room with honest members, and somebody who floods it.
type floodScene struct {
	t       *testing.T
	ctx     context.Context
	bot     *botproc.Bot
	flooder *flooder
	metrics string
	honest  []*people.Person
	mallory *people.Person
	room    id.RoomID
	serial  int
}

// keysStored, eventsTaken and devicesAskedFor say that the bot has taken in what came.
func (s *floodScene) keysStored(tries int, before, now map[string]float64) bool {
	return now["sendertrust_room_keys_total"]-before["sendertrust_room_keys_total"] >= float64(tries)
}

func (s *floodScene) eventsTaken(tries int, before, now map[string]float64) bool {
	taken := func(values map[string]float64) float64 {
		return values["sendertrust_events_total"] + values["sendertrust_waiting_events"]
	}
	return taken(now)-taken(before) >= float64(tries)
}

func (s *floodScene) devicesAskedFor(_ int, before, now map[string]float64) bool {
	return now["sendertrust_key_queries_total"] > before["sendertrust_key_queries_total"] && now["sendertrust_pending_users"] == 0
}

var floods = []flood{
	{name: "room keys", tries: 10_000, waves: (*floodScene).roomKeys, arrived: (*floodScene).keysStored},
	{
		name: "undecryptable events", tries: 10_000, waves: (*floodScene).undecryptable, arrived: (*floodScene).eventsTaken,
		check: (*floodScene).toldOnce,
	},
	{name: "events of 60 KiB", tries: 1000, waves: (*floodScene).large, arrived: (*floodScene).eventsTaken},
	{name: "keys of 60 KiB", tries: 500, waves: (*floodScene).largeKeys, arrived: (*floodScene).keysStored},
	{name: "500 devices, always other ones", tries: 50, waves: devices(500), arrived: (*floodScene).devicesAskedFor},
	{name: "1,000 devices", tries: 20, waves: devices(1000), arrived: (*floodScene).devicesAskedFor},
	{name: "display names", tries: 1000, waves: (*floodScene).names, arrived: (*floodScene).allSent},
	{name: "invites", tries: 200, waves: (*floodScene).invites, arrived: (*floodScene).allJoined},
}

func TestFloods(t *testing.T) {
	w := theWorld(t)
	s := newFloodScene(t, w)
	usually := s.talk("nothing", often(4, 25), func() bool { return true })
	check(t, usually)
	for _, f := range floods {
		tries := often(max(10, f.tries/20), f.tries)
		waves := f.waves(s, tries)
		before := s.scrape()
		s.flooder.flood(waveEvery, waves...)
		begun := time.Now()
		line := s.talk(f.name, often(1, 25), func() bool {
			return s.flooder.left() == 0 && f.arrived(s, tries, before, s.scrape())
		})
		line.tries, line.usually = tries, usually.answers
		line.note = fmt.Sprintf("within %s", time.Since(begun).Round(time.Second))
		check(t, line)
		if limit := limitOf(answeredWithinShort, answeredWithin); line.answers.p99 > limit {
			t.Errorf("%s: honest members were answered within %s, 99 times of 100, not %s", f.name, line.answers.p99, limit)
		}
		if line.peak > memoryLimit {
			t.Errorf("%s: the bot took %d MiB", f.name, line.peak>>20)
		}
		if f.check != nil {
			f.check(s)
		}
	}
}

func limitOf(short, long time.Duration) time.Duration {
	if *full {
		return long
	}
	return short
}

func newFloodScene(t *testing.T, w *world) *floodScene {
	t.Helper()
	s := &floodScene{t: t, ctx: within(t, 10*time.Minute), flooder: newFlooder(t, w.server.URL), metrics: freeAddress(t)}
	s.bot = w.newBot(t, botOptions{homeserver: s.flooder.URL, configure: func(config botproc.Config) {
		delete(config, "limits") // those that users have
		config["encryption"].(botproc.Config)["wait"] = floodKeyWait.String()
		config["metrics"] = botproc.Config{"listen": s.metrics}
	}})
	for range honestMembers {
		s.honest = append(s.honest, w.newStranger(t, "honest"))
	}
	s.mallory = w.newStranger(t, "mallory")
	guests := []id.UserID{s.bot.UserID, s.mallory.UserID}
	for _, guest := range s.honest[1:] {
		guests = append(guests, guest.UserID)
	}
	s.room = w.newRoom(t, s.honest[0], guests...)
	for _, guest := range append([]*people.Person{s.mallory}, s.honest[1:]...) {
		ok(t, guest.Join(s.ctx, s.room))
	}
	for _, person := range append([]*people.Person{s.mallory}, s.honest...) {
		for _, guest := range guests {
			ok(t, person.WaitJoined(s.ctx, s.room, guest))
		}
	}
	return s
}

// freeAddress gives an address of this machine that nobody listens on.
func freeAddress(t *testing.T) string {
	t.Helper()
	listener := must(net.Listen("tcp", "127.0.0.1:0"))(t)
	defer listener.Close()
	return listener.Addr().String()
}

// scrape reads the bot's numbers, those without labels.
func (s *floodScene) scrape() map[string]float64 {
	s.t.Helper()
	resp := must(http.Get("http://" + s.metrics + "/metrics"))(s.t)
	defer resp.Body.Close()
	values := make(map[string]float64)
	for line := range strings.Lines(string(must(io.ReadAll(resp.Body))(s.t))) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		if number, err := strconv.ParseFloat(value, 64); err == nil {
			values[name] = number
		}
	}
	return values
}

// talk has the honest members talk, each so many messages at least and until it is done, and measures how soon they are answered.
func (s *floodScene) talk(name string, least int, done func() bool) result {
	s.t.Helper()
	var book ledger
	var talking sync.WaitGroup
	var mu sync.Mutex
	var times []time.Duration
	ended := make(chan struct{})
	spoken := make(chan struct{}, honestMembers)
	for i, person := range s.honest {
		talking.Go(func() {
			pace := time.NewTicker(talkEvery)
			defer pace.Stop()
			var waiting sync.WaitGroup
			defer waiting.Wait()
			for n := 0; ; n++ {
				if n == least {
					spoken <- struct{}{}
				}
				if n%5 == 0 {
					person.RotateSession(s.room)
				}
				m := message{reader: person, roomID: s.room, code: "unverified_identity", sent: time.Now()}
				var err error
				if m.eventID, err = person.Send(s.ctx, s.room, say(fmt.Sprintf("%s: message %d of %d", name, n, i))); err != nil {
					s.t.Error(err)
					return
				}
				book.note(m)
				waiting.Go(func() {
					if _, err := person.WaitForAnswer(s.ctx, m.eventID); err == nil {
						mu.Lock()
						defer mu.Unlock()
						times = append(times, time.Since(m.sent))
					}
				})
				select {
				case <-pace.C:
				case <-ended:
					return
				case <-s.ctx.Done():
					return
				}
			}
		})
	}
	for range s.honest {
		select {
		case <-spoken:
		case <-s.ctx.Done():
			s.t.Fatal("the honest members did not get to talk")
		}
	}
	for poll := time.NewTicker(200 * time.Millisecond); !done(); {
		select {
		case <-poll.C:
		case <-s.ctx.Done():
			s.t.Fatalf("%s: the bot has not taken it all in", name)
		}
	}
	close(ended)
	talking.Wait()
	r := result{part: "floods", what: name, answers: latencyOf(times), peak: must(s.bot.PeakRSS())(s.t)}
	book.count(s.t, s.bot.UserID, &r)
	return r
}

// slices of a flood, as a homeserver brings them.
func inWaves[T any](items []T, size int, make func(items []T) wave) (waves []wave) {
	for len(items) > 0 {
		size := min(size, len(items))
		waves = append(waves, make(items[:size]))
		items = items[size:]
	}
	return waves
}

func (s *floodScene) device() *people.Device {
	s.t.Helper()
	return must(s.mallory.Devices(s.ctx, s.bot.UserID))(s.t)[0]
}

// keys makes room keys of the flooder's, each of another session, for the bot.
func (s *floodScene) keys(count int, padding string) (events []any) {
	s.t.Helper()
	device := s.device()
	for range count {
		session := must(s.mallory.NewSession(s.room))(s.t)
		payload := must(s.mallory.OlmPayload(device, event.ToDeviceRoomKey.Type, map[string]any{
			"algorithm": id.AlgorithmMegolmV1, "room_id": s.room, "session_id": session.ID, "session_key": session.Key, "padding": padding,
		}))(s.t)
		content := must(s.mallory.EncryptOlm(s.ctx, device, must(json.Marshal(payload))(s.t)))(s.t)
		events = append(events, map[string]any{"type": event.ToDeviceEncrypted.Type, "sender": s.mallory.UserID, "content": content})
	}
	return events
}

func (s *floodScene) roomKeys(count int) []wave {
	return inWaves(s.keys(count, ""), 100, func(events []any) wave { return wave{toDevice: events} })
}

// largeKeys come in events of 60 KiB, below what the bot looks at, by which they are a third larger.
func (s *floodScene) largeKeys(count int) []wave {
	return inWaves(s.keys(count, strings.Repeat("x", 40<<10)), 10, func(events []any) wave { return wave{toDevice: events} })
}

// timelineEvent makes an event of the flooder's in the room.
func (s *floodScene) timelineEvent(eventType string, content map[string]any) map[string]any {
	s.serial++
	return map[string]any{
		"type": eventType, "event_id": fmt.Sprintf("$flood%d", s.serial), "sender": s.mallory.UserID,
		"origin_server_ts": time.Now().UnixMilli(), "content": content,
	}
}

func (s *floodScene) inRoom(events []any) wave {
	return wave{timelines: map[id.RoomID][]any{s.room: events}}
}

// unreadable makes events of sessions that do not exist.
func (s *floodScene) unreadable(count, bytes int) (events []any) {
	for range count {
		events = append(events, s.timelineEvent(event.EventEncrypted.Type, map[string]any{
			"algorithm": id.AlgorithmMegolmV1, "device_id": s.mallory.DeviceID, "sender_key": s.mallory.SenderKey(),
			"session_id": base64.RawStdEncoding.EncodeToString(fmt.Appendf(nil, "%032d", s.serial)),
			"ciphertext": strings.Repeat("AwgA", bytes/4),
		}))
	}
	return events
}

func (s *floodScene) undecryptable(count int) []wave {
	return inWaves(s.unreadable(count, 300), 100, s.inRoom)
}

func (s *floodScene) large(count int) []wave {
	return inWaves(s.unreadable(count, 60<<10), 25, s.inRoom)
}

// toldOnce makes sure that the room was told once that the flooder is not answered any more.
func (s *floodScene) toldOnce() {
	told := 0
	for _, notice := range s.honest[0].Notices(s.room) {
		if strings.Contains(notice.Body, "stopped answering "+s.mallory.UserID.String()) {
			told++
		}
	}
	if told != 1 {
		s.t.Errorf("the room was told %d times that %s is not answered any more", told, s.mallory.UserID)
	}
}

// devices has the flooder's devices change again and again.
func devices(count int) func(s *floodScene, changes int) []wave {
	return func(s *floodScene, changes int) (waves []wave) {
		published := make(map[id.DeviceID]any, count)
		for i := range count {
			deviceID := id.DeviceID(fmt.Sprintf("FLOOD%dOF%d", i, count))
			published[deviceID] = s.deviceKeys(deviceID)
		}
		s.flooder.publish(s.mallory.UserID, published)
		for range changes {
			waves = append(waves, wave{changed: []id.UserID{s.mallory.UserID}})
		}
		return waves
	}
}

// deviceKeys makes the keys of a device that its owner has not confirmed.
func (s *floodScene) deviceKeys(deviceID id.DeviceID) any {
	s.t.Helper()
	account := crypto.NewOlmAccount()
	keys := map[string]any{
		"user_id": s.mallory.UserID, "device_id": deviceID, "algorithms": []id.Algorithm{id.AlgorithmOlmV1, id.AlgorithmMegolmV1},
		"keys": map[string]any{
			"curve25519:" + deviceID.String(): account.IdentityKey(), "ed25519:" + deviceID.String(): account.SigningKey(),
		},
	}
	signature := must(account.SignJSON(keys))(s.t)
	keys["signatures"] = map[id.UserID]any{s.mallory.UserID: map[string]any{"ed25519:" + deviceID.String(): signature}}
	return keys
}

// names are changes of the flooder's display name, of 60 KiB each.
func (s *floodScene) names(count int) []wave {
	var events []any
	for i := range count {
		evt := s.timelineEvent(event.StateMember.Type, map[string]any{
			"membership": "join", "displayname": fmt.Sprint(i, strings.Repeat("\u202e👻", 60<<10/7)),
		})
		evt["state_key"] = s.mallory.UserID
		evt["unsigned"] = map[string]any{"prev_content": map[string]any{"membership": "join"}}
		events = append(events, evt)
	}
	return inWaves(events, 20, s.inRoom)
}

func (s *floodScene) allSent(int, map[string]float64, map[string]float64) bool {
	return s.flooder.left() == 0
}

// invites are into rooms that take long to join.
func (s *floodScene) invites(count int) []wave {
	var rooms []id.RoomID
	for i := range count {
		rooms = append(rooms, id.RoomID(fmt.Sprintf("%s%d:localhost", floodRoom, i)))
	}
	return inWaves(rooms, 50, func(rooms []id.RoomID) wave {
		w := wave{invites: make(map[id.RoomID][]any)}
		for _, room := range rooms {
			w.invites[room] = []any{map[string]any{
				"type": event.StateMember.Type, "state_key": s.bot.UserID, "sender": s.mallory.UserID, "content": map[string]any{"membership": "invite"},
			}}
		}
		return w
	})
}

// allJoined says that the bot has accepted as many invitations as it may in a minute, or all of them.
func (s *floodScene) allJoined(tries int, _, now map[string]float64) bool {
	return s.flooder.joined() >= min(tries, 60) && now["sendertrust_pending_invites"] <= float64(max(0, tries-60))
}
