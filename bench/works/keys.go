package works

import (
	"encoding/json"
	"fmt"

	"maunium.net/go/mautrix/id"

	"sendertrust/bench/inputs"
	"sendertrust/bench/receiver"
)

const (
	// warmSessions have so many messages each, in turn, after one that brings the session to mind.
	warmSessions = 200
	warmMessages = 10
	// flushEvery is after how many messages what was learnt by decrypting them is made durable.
	flushEvery = 100
)

// keys has so many devices send room keys, and then messages: receive_1 or receive_200, and of one device decrypt_warm and decrypt_cold.
func (b *bench) keys(senders int) {
	people := inputs.NewPeople(senders, 1)
	b.open(people...)
	devices := b.greetedDevices(people)
	sessions, bodies := b.roomKeys(devices, b.Keys)
	before := inputs.Must(b.Sessions(b.ctx))
	received := b.measure(fmt.Sprintf("receive_%d", senders), b.Keys, func() {
		for _, body := range bodies {
			b.server.SyncBody(body)
		}
	})
	if after := inputs.Must(b.Sessions(b.ctx)); after != before+b.Keys {
		panic(fmt.Errorf("%d of %d room keys were stored", after-before, b.Keys))
	}
	b.checkSenders(b.Keys + senders)
	received.Values = map[string]float64{"event_bytes": eventBytes(bodies, b.Keys)}
	b.report(received)
	if senders == 1 {
		b.decrypt(sessions)
	}
	b.close()
}

const countProvenQuery = "SELECT COUNT(*) FROM sendertrust_session WHERE state='sender_unverified'"

// checkSenders makes sure that the hook has derived who sent each of so many sessions.
func (b *bench) checkSenders(want int) {
	if b.Side != receiver.Hook {
		return
	}
	var proven int
	inputs.Check(b.DB.QueryRow(b.ctx, countProvenQuery).Scan(&proven))
	if proven != want {
		panic(fmt.Errorf("the senders of %d sessions are derived, not of %d", proven, want))
	}
}

// roomKeys makes room keys by the devices in turn, each for a room of its own, and the /sync answers that bring them.
func (b *bench) roomKeys(devices []*inputs.Device, count int) (sessions []*inputs.Session, bodies []json.RawMessage) {
	b.makeRoomKeys(devices, count, func(made []*inputs.Session, body json.RawMessage) {
		sessions, bodies = append(sessions, made...), append(bodies, body)
	})
	return sessions, bodies
}

// makeRoomKeys is roomKeys, one /sync after the other.
func (b *bench) makeRoomKeys(devices []*inputs.Device, count int, each func(made []*inputs.Session, body json.RawMessage)) {
	var batch []json.RawMessage
	var made []*inputs.Session
	for i := range count {
		device := devices[i%len(devices)]
		session := device.NewSession(id.RoomID(fmt.Sprintf("!r%d:bench", i)))
		made = append(made, session)
		batch = append(batch, device.ShareKey(b.Own(), session))
		if len(batch) == b.Batch || i == count-1 {
			each(made, b.server.Body(batch, nil, ""))
			made, batch = nil, nil
		}
	}
}

func eventBytes(bodies []json.RawMessage, count int) float64 {
	bytes := 0
	for _, body := range bodies {
		bytes += len(body)
	}
	return float64(bytes / count)
}

// decrypt measures messages of sessions that were used just before, and then the first message of each session after the database
// was opened again.
func (b *bench) decrypt(sessions []*inputs.Session) {
	warm := sessions[:min(warmSessions, len(sessions))]
	b.decryptAll(messagesOf(warm, 1))
	messages := messagesOf(warm, warmMessages)
	b.report(b.measure("decrypt_warm", len(messages), func() { b.decryptAll(messages) }))

	messages = messagesOf(sessions, 1)
	b.close()
	b.open()
	b.report(b.measure("decrypt_cold", len(messages), func() { b.decryptAll(messages) }))
}

// messagesOf makes messages of the sessions in turn, as a busy account sees them.
func messagesOf(sessions []*inputs.Session, each int) (messages []json.RawMessage) {
	for range each {
		for _, session := range sessions {
			messages = append(messages, session.Message())
		}
	}
	return messages
}

func (b *bench) decryptAll(messages []json.RawMessage) {
	for i, message := range messages {
		inputs.Check(b.Decrypt(b.ctx, message))
		if i%flushEvery == flushEvery-1 {
			inputs.Check(b.Flush(b.ctx))
		}
	}
	inputs.Check(b.Flush(b.ctx))
}

const (
	firstMessages = 500
	queryUsers    = 1000
	queryDevices  = 5
)

// first measures the first message of each of many devices: a room key in a new Olm session, by a one-time key.
func (b *bench) first() {
	people := inputs.NewPeople(firstMessages, 1)
	b.open(people...)
	devices := make([]*inputs.Device, len(people))
	for i, p := range people {
		devices[i] = p.Devices[0]
	}
	tally := b.newTally("first_message")
	b.meet(devices, func(met []*inputs.Device) {
		body := b.server.Body(b.shareAll(met, "!first:bench"), nil, "")
		tally.add(len(met), func() { b.server.SyncBody(body) })
	})
	if stored := inputs.Must(b.Sessions(b.ctx)); stored != firstMessages {
		panic(fmt.Errorf("%d of %d first messages were stored", stored, firstMessages))
	}
	b.report(tally.stop())
	b.close()
}

// query measures the first key query about many people: read, checked, and stored.
func (b *bench) query() {
	people := inputs.NewPeople(queryUsers, queryDevices)
	b.account = inputs.NewPerson(inputs.Receiver, 0)
	b.server = inputs.NewServer(b.account, people...)
	b.open()
	queries := b.server.Queries(people)
	b.report(b.measure("key_query", queryUsers*queryDevices, func() {
		for _, query := range queries {
			b.server.CanAnswer(query.Answer)
			inputs.Check(b.Fetch(b.ctx, query.Users))
		}
	}))
	b.close()
}
