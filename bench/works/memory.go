package works

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"maunium.net/go/mautrix/event"

	"sendertrust/bench/inputs"
	"sendertrust/cryptohook"
)

// memory receives with nothing else in memory: what is received is read from a file.
func (b *bench) memory() {
	file := filepath.Join(b.Dir, "syncs")
	b.prepareFile(file)
	syncs := inputs.Must(os.Open(file))
	defer syncs.Close()
	lines := bufio.NewReaderSize(syncs, 1<<20)
	received := b.measure(fmt.Sprintf("memory_%d", b.Keys), b.Keys, func() {
		for range (b.Keys + b.Batch - 1) / b.Batch {
			b.server.SyncBody(inputs.Must(lines.ReadBytes('\n')))
		}
	})
	if stored := inputs.Must(b.Sessions(b.ctx)); stored != b.Keys+1 {
		panic(fmt.Errorf("%d of %d room keys were stored", stored-1, b.Keys))
	}
	received.ResidentKiB = residentKiB()
	goHeap := goHeapKiB()
	received.LiveKiB = goHeap + cHeapKiB()
	received.Values = map[string]float64{"go_heap_kib": float64(goHeap)}
	b.report(received)
	b.close()
}

// prepareFile writes the /sync answers that bring room keys of one device.
func (b *bench) prepareFile(path string) {
	people := inputs.NewPeople(1, 1)
	b.open(people...)
	file := inputs.Must(os.Create(path))
	writer := bufio.NewWriter(file)
	b.makeRoomKeys(b.greetedDevices(people), b.Keys, func(_ []*inputs.Session, body json.RawMessage) {
		inputs.Must(writer.Write(append(body, '\n')))
	})
	inputs.Check(writer.Flush())
	inputs.Check(file.Close())
}

// copiedSenders share the copied sessions.
const copiedSenders = 1000

// How one session, its claim, and its device become many, under other IDs. The numbers of the new senders begin where nobody else's are.
const (
	makeIDsQuery = `
		CREATE TABLE bench_id AS
		WITH RECURSIVE numbers(number) AS (SELECT 1 UNION ALL SELECT number+1 FROM numbers WHERE number<$1)
		SELECT number, substr(hex(randomblob(22)), 1, 43) AS session_id FROM numbers
	`
	copySendersQuery = `
		INSERT INTO sendertrust_sender (id, user_id, identity_key, signing_key)
		SELECT 1000000+number, '@copied' || number || ':bench', substr(identity_key, 1, 39) || printf('%04d', number-1), signing_key
		FROM bench_id, (SELECT * FROM sendertrust_sender LIMIT 1) WHERE number<=$1
	`
	copyClaimsQuery = `
		INSERT INTO sendertrust_claim
		SELECT bench_id.session_id, 1000001+number%$1, '!copied' || (number%500) || ':bench', source, legacy_session, state, reason, device_id,
		       master_key, device_keys, embedded, retry_count, next_retry_time_ms, received_at_ms, updated_at_ms
		FROM bench_id, (SELECT * FROM sendertrust_claim LIMIT 1)
	`
)

// fill puts copies of the one session that was received into the database.
func (b *bench) fill(count int) {
	var others []string
	rows := inputs.Must(b.DB.Query(b.ctx, "SELECT * FROM crypto_megolm_inbound_session LIMIT 0"))
	for _, column := range inputs.Must(rows.Columns()) {
		if column != "session_id" && column != "room_id" {
			others = append(others, column)
		}
	}
	inputs.Check(rows.Close())
	columns := strings.Join(others, ", ")
	copySessions := fmt.Sprintf(`
		INSERT INTO crypto_megolm_inbound_session (session_id, room_id, %[1]s)
		SELECT bench_id.session_id, '!copied' || (number%%500) || ':bench', %[1]s
		FROM bench_id, (SELECT %[1]s FROM crypto_megolm_inbound_session LIMIT 1)
	`, columns)
	inputs.Check(b.DB.DoTxn(b.ctx, nil, func(ctx context.Context) error {
		for _, statement := range []struct {
			query string
			args  []any
		}{
			{makeIDsQuery, []any{count}}, {copySendersQuery, []any{copiedSenders}}, {copySessions, nil}, {copyClaimsQuery, []any{copiedSenders}},
			{"DROP TABLE bench_id", nil},
		} {
			if _, err := b.DB.Exec(ctx, statement.query, statement.args...); err != nil {
				return err
			}
		}
		return nil
	}))
}

// stored measures with many sessions in the database: receive_stored, then start_stored, and decrypt_stored right after it.
func (b *bench) stored() {
	people := inputs.NewPeople(1, 1)
	b.open(people...)
	devices := b.greetedDevices(people)
	b.fill(b.Stored)
	sessions, bodies := b.roomKeys(devices, b.Keys)
	b.report(b.measure("receive_stored", b.Keys, func() {
		for _, body := range bodies {
			b.server.SyncBody(body)
		}
	}))
	messages := messagesOf(sessions, 1)
	b.close()
	bodies = nil
	b.report(b.measure("start_stored", 1, func() { b.start(nil) }))
	b.Settle()
	b.report(b.measure("decrypt_stored", len(messages), func() { b.decryptAll(messages) }))
	b.close()
}

const (
	changedSessions = 10_000
	changedDevices  = 5
)

const countViolationsQuery = `SELECT COUNT(*) FROM sendertrust_session WHERE sender=$1 AND state='verification_violation'`

// identity measures how long it takes until all sessions of a verified person who has a new identity are judged by it, for good.
func (b *bench) identity() {
	person := inputs.NewPeople(1, changedDevices)[0]
	b.open(person)
	b.meet(person.Devices, func(met []*inputs.Device) {
		b.server.Sync(b.shareAll(met, "!first:bench"), nil, "")
		for _, device := range met {
			inputs.Check(b.Greet(b.ctx, device))
		}
	})
	b.makeRoomKeys(person.Devices, changedSessions-changedDevices, func(_ []*inputs.Session, body json.RawMessage) { b.server.SyncBody(body) })
	inputs.Check(b.Hook.Verify(b.ctx, person.UserID, person.MasterKey()))
	inputs.Check(b.Learn(b.ctx, person))
	b.Settle()
	person.Reset()
	b.report(b.measure("identity_change", 1, func() { inputs.Check(b.Learn(b.ctx, person)) }))
	var judged int
	inputs.Check(b.DB.QueryRow(b.ctx, countViolationsQuery, person.UserID).Scan(&judged))
	if judged != changedSessions {
		panic(fmt.Errorf("%d of %d sessions are judged by the new identity", judged, changedSessions))
	}
	b.close()
}

const roomMembers = 5000

// room measures what it takes from joining a room with many members to the first verdict there, and to the first answer.
func (b *bench) room() {
	members := inputs.NewPeople(roomMembers, 1)
	b.account = inputs.NewPerson(inputs.Receiver, 0)
	b.server = inputs.NewServer(b.account, members...)
	verdicts := make(chan cryptohook.Verdict, 1)
	b.openFor(func(_ context.Context, evt *event.Event) {
		if verdict, ok := cryptohook.VerdictOf(evt); ok {
			verdicts <- verdict
		}
	})
	sender := members[0].Devices[0]
	sender.Meet(b.Own(), b.server.Claim())
	session := sender.NewSession("!crowd:bench")
	joined := b.server.Join("!crowd:bench", members...)
	spoken := b.server.Body([]json.RawMessage{sender.ShareKey(b.Own(), session)}, []json.RawMessage{session.Message()}, "!crowd:bench")
	before := total(b.server.Requests())
	b.server.SyncBody(b.server.Body(nil, nil, ""))
	figure := b.measure("room_5000", 1, func() {
		b.server.SyncBody(joined)
		b.server.SyncBody(spoken)
		if verdict := <-verdicts; verdict.Code != cryptohook.CodeUnverifiedIdentity {
			panic(fmt.Errorf("the first verdict is %s", verdict.Code))
		}
	})
	figure.Values = map[string]float64{"requests": float64(total(b.server.Requests()) - before)}
	b.report(figure)
	figure = b.measure("room_5000_answer", 1, func() {
		content := &event.MessageEventContent{MsgType: event.MsgNotice, Body: "an answer"}
		inputs.Must(b.Hook.Encrypt(b.ctx, "!crowd:bench", event.EventMessage, content))
	})
	figure.Values = map[string]float64{"requests": float64(total(b.server.Requests()) - before)}
	b.report(figure)
	b.close()
}

func total(requests map[string]int) (sum int) {
	for _, count := range requests {
		sum += count
	}
	return sum
}
