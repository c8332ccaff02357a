package bot

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"strings"
	"time"

	"go.mau.fi/util/dbutil"
	"maunium.net/go/mautrix/id"

	"sendertrust/cryptohook"
)

// The audit table: who has told the bot to change whom it trusts, who has tried without being entitled to, and what became of it.

// outcome is what became of a command.
type outcome string

const (
	outcomeDone    outcome = "" // in the table: done
	outcomeRefused outcome = "refused"
	outcomeFailed  outcome = "failed"

	// A row that a crash has left behind says that the command was begun.
	auditBegun = ""
	auditDone  = "done"
)

// auditLine is one row.
type auditLine struct {
	eventID   id.EventID
	at        time.Time
	roomID    id.RoomID
	sender    id.UserID
	deviceID  id.DeviceID
	masterKey id.Ed25519
	code      cryptohook.Code
	command   string
	arguments string
	outcome   string
	detail    string
}

const (
	insertAuditQuery = `
		INSERT INTO bot_audit (event_id, at_ms, room_id, sender, device_id, master_key, code, command, arguments, outcome, detail)
		VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11) ON CONFLICT (event_id) DO UPDATE SET outcome=excluded.outcome, detail=excluded.detail
			WHERE bot_audit.outcome=''
	`
	// What was confirmed before the person had is done, or fails, later.
	amendAuditQuery = `UPDATE bot_audit SET outcome=$2, detail=$3 WHERE event_id=$1 AND outcome='done'`
	selectAudit     = `
		SELECT event_id, at_ms, room_id, sender, device_id, master_key, code, command, arguments, outcome, detail FROM bot_audit
	`
	getAuditQuery   = selectAudit + `WHERE at_ms>0 ORDER BY at_ms DESC LIMIT $1`
	getAuditOfQuery = selectAudit + `WHERE event_id=$1`
	// Whatever anybody may write as often as they like is not kept for ever.
	pruneAuditQuery = `
		DELETE FROM bot_audit WHERE outcome='refused' AND
			at_ms<(SELECT at_ms FROM bot_audit WHERE outcome='refused' ORDER BY at_ms DESC LIMIT 1 OFFSET $1)
	`
)

const (
	// auditRefusals is how many refused commands are kept, those of all senders together.
	auditRefusals = 10_000
	// auditPruneEvery is after how many refusals the oldest are dropped.
	auditPruneEvery = 100
	// longestArguments is how much of a command's words is kept, in characters.
	longestArguments = 200
)

func scanAuditLine(row dbutil.Scannable) (line auditLine, err error) {
	var at int64
	err = row.Scan(&line.eventID, &at, &line.roomID, &line.sender, &line.deviceID, &line.masterKey, &line.code, &line.command, &line.arguments,
		&line.outcome, &line.detail)
	line.at = time.UnixMilli(at)
	return line, err
}

// putAudit notes a line; one of the same event gets its outcome, if it has none yet.
func (s *records) putAudit(ctx context.Context, line *auditLine) error {
	return s.exec(ctx, insertAuditQuery, line.eventID, line.at.UnixMilli(), line.roomID, line.sender, line.deviceID, line.masterKey, line.code,
		line.command, line.arguments, line.outcome, line.detail)
}

// amendAudit changes what became of a command that was noted as done.
func (s *records) amendAudit(ctx context.Context, eventID id.EventID, outcome, detail string) error {
	return s.exec(ctx, amendAuditQuery, eventID, outcome, detail)
}

// auditOf gives the line of an event, or nil.
func (s *records) auditOf(ctx context.Context, eventID id.EventID) (*auditLine, error) {
	line, err := scanAuditLine(s.QueryRow(ctx, getAuditOfQuery, eventID))
	if errors.Is(err, sql.ErrNoRows) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("failed to read the audit table: %w", err)
	}
	return &line, nil
}

// lastAudits gives the newest lines, the newest first.
func (s *records) lastAudits(ctx context.Context, count int) ([]auditLine, error) {
	rows, err := s.Query(ctx, getAuditQuery, count)
	list, err := dbutil.NewRowIterWithError(rows, scanAuditLine, err).AsList()
	if err != nil {
		return nil, fmt.Errorf("failed to read the audit table: %w", err)
	}
	return list, nil
}

func (s *records) pruneAudit(ctx context.Context) error {
	return s.exec(ctx, pruneAuditQuery, auditRefusals)
}

// lineOf is the row of an order.
func (b *Bot) lineOf(o *order, outcome, detail string) *auditLine {
	return &auditLine{
		eventID: o.evt.ID, at: b.clock(), roomID: o.evt.RoomID, sender: o.evt.Sender,
		deviceID: o.verdict.DeviceID, masterKey: o.verdict.MasterKey, code: o.verdict.Code,
		command: clipTo(o.name, longestArguments), arguments: clipTo(strings.Join(o.args, " "), longestArguments), outcome: outcome, detail: detail,
	}
}

// note writes into the audit table what became of an order.
func (b *Bot) note(ctx context.Context, o *order, r response) {
	outcome := string(r.outcome)
	if r.outcome == outcomeDone {
		outcome = auditDone
	}
	b.audit(ctx, b.lineOf(o, outcome, r.detail))
}

// audit writes a line, and drops the oldest refusals now and then.
func (b *Bot) audit(ctx context.Context, line *auditLine) {
	log := b.log.With().Stringer("event_id", line.eventID).Stringer("sender", line.sender).Str("command", line.command).Logger()
	if err := b.reviser.records.putAudit(ctx, line); err != nil {
		log.Err(err).Msg("Failed to write into the audit table")
	}
	if line.outcome != string(outcomeRefused) {
		return
	}
	log.Warn().Str("code", string(line.code)).Str("detail", line.detail).Msg("Refused an operator's command")
	if b.refusals.Add(1)%auditPruneEvery == 0 {
		if err := b.reviser.records.pruneAudit(ctx); err != nil {
			log.Err(err).Msg("Failed to drop old lines of the audit table")
		}
	}
}
