-- Health of a SecureVLLMDeployment for Argo CD. Argo CD gives the live object as `obj` and takes `status` and `message`
-- of the table that is returned. The reasons are those of docs/status.md; a test compares them with the operator's.

-- What passes by itself. Every other reason of a condition that is False needs somebody.
local passing = {
  FetchingModel = true,
  GroupRestarting = true,
  NoHealthyEngine = true,
  NotCreated = true,
  OldRevisionServed = true,
  Progressing = true,
  RevisionUnknown = true,
  WaitingForGarbageCollection = true,
}

local function health(status, message)
  return { status = status, message = message }
end

if obj.metadata.deletionTimestamp ~= nil then
  return health("Progressing", "It is being deleted.")
end
if obj.status == nil or obj.status.conditions == nil then
  return health("Progressing", "The operator has not looked at it yet.")
end

local conditions = {}
for _, condition in ipairs(obj.status.conditions) do
  conditions[condition.type] = condition
end
local function is(name, wanted)
  return conditions[name] ~= nil and conditions[name].status == wanted
end

if obj.status.observedGeneration ~= obj.metadata.generation then
  return health("Progressing", "The operator has not looked at the last change yet.")
end
if is("Accepted", "False") then
  return health("Degraded", conditions.Accepted.message)
end
-- Before the rest: what serves without isolation is not well.
if is("Isolated", "False") then
  return health("Degraded", "Isolated: " .. conditions.Isolated.message)
end
if is("Ready", "True") then
  local message = conditions.Ready.message
  if is("Isolated", "Unknown") then
    message = message .. " Isolated is Unknown: " .. conditions.Isolated.message
  end
  return health("Healthy", message)
end
for _, name in ipairs({ "EnginesReady", "GatewayReady" }) do
  if is(name, "False") then
    local condition = conditions[name]
    local message = name .. ": " .. condition.message
    if condition.reason == "Suspended" or condition.reason == "ScaledToZero" then
      return health("Suspended", message)
    end
    if not passing[condition.reason] then
      return health("Degraded", message)
    end
  end
end
if conditions.Ready ~= nil then
  return health("Progressing", conditions.Ready.message)
end
return health("Progressing", "The operator has not said yet whether it is ready.")
